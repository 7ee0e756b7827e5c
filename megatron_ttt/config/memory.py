"""What a run holds on one device whatever its data: weights, gradients, optimizer. No torch.

Closed forms over the configuration, for one tensor-parallel rank of one pipeline stage. What the
layers keep for the backward is counted from their code instead (``benchmarks/memory_plan.py``).
"""

from dataclasses import dataclass
from math import prod

from megatron_ttt.config.derived import padded_vocab_size, ttt_layers
from megatron_ttt.config.schema import ComputeConfig, Config, Trainable
from megatron_ttt.rule import Placement, added_parameters

_FP32 = 4
_MOMENTS = 8  # AdamW's two, fp32


@dataclass(frozen=True)
class StaticMemory:
    """Bytes on one device, of the whole run.

    Attributes:
        parameters: elements that the rank holds.
        weights: in the compute dtype.
        gradients: sums in fp32, of every parameter that is trained.
        optimizer: moments, and fp32 master weights beside bf16 ones; a share of them where
            data-parallel ranks share the optimizer.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int


def static_memory(config: Config, *, stage: int, shards: int, compute_bytes: int) -> StaticMemory:
    """Return what one rank of a pipeline stage holds, padding of buffers apart.

    Args:
        config: a valid configuration.
        stage: pipeline stage, from 0.
        shards: data-parallel times context-parallel ranks, which share the optimizer's state
            under ``parallel.distributed_optimizer``.
        compute_bytes: of one weight, 2 in bf16.
    """
    parameters, trained = stage_parameters(config, stage), trained_parameters(config, stage)
    masters = _FP32 if compute_bytes < _FP32 else 0
    state = trained * (_MOMENTS + masters)
    if config.parallel.distributed_optimizer:
        state = -(-state // shards)
    return StaticMemory(parameters, parameters * compute_bytes, trained * _FP32, state)


def stage_parameters(config: ComputeConfig, stage: int) -> int:
    """Return the elements that one tensor-parallel rank of a pipeline stage holds."""
    model, parallel = config.model, config.parallel
    tp, pp, hidden = parallel.tp, parallel.pp, config.model.hidden_size
    fast = len(_fast_layers(config, stage))
    total = model.layers // pp * layer_parameters(config) + fast * _added_parameters(config)
    rows = padded_vocab_size(model, tp) // tp * hidden
    first, last = stage == 0, stage == pp - 1
    if last:
        total += hidden  # the final norm
    # A tied output layer on a stage of its own is a copy of the embedding.
    total += rows * (first + last) if pp > 1 or not model.tied_embeddings else rows
    return total


def trained_parameters(config: Config, stage: int) -> int:
    """Return the elements among :func:`stage_parameters` that a run changes."""
    if config.train.trainable is Trainable.all:
        return stage_parameters(config, stage)
    own = _added_parameters(config)
    if config.train.trainable is Trainable.fast_layers:
        own += layer_parameters(config)
    return len(_fast_layers(config, stage)) * own


def _fast_layers(config: ComputeConfig, stage: int) -> set[int]:
    count = config.model.layers // config.parallel.pp
    return set(range(stage * count, (stage + 1) * count)) & set(ttt_layers(config))


def layer_parameters(config: ComputeConfig) -> int:
    """Return the elements of one plain layer on one tensor-parallel rank."""
    model, tp = config.model, config.parallel.tp
    hidden, queries = model.hidden_size, model.heads * model.head_dim
    joined = queries + 2 * model.kv_groups * model.head_dim
    attention = (joined * hidden + queries * hidden) // tp
    if model.attention_bias:
        attention += joined // tp
    mlp = 3 * model.ffn_hidden_size * hidden // tp
    norms = 2 * hidden + (2 * model.head_dim if model.qk_norm else 0)
    return attention + mlp + norms


def _added_parameters(config: ComputeConfig) -> int:
    """Of a fast layer, beside the plain layer's."""
    total = 0
    for spec in added_parameters(config.ttt).values():
        split = config.parallel.tp if spec.placement is Placement.columns else 1
        total += prod(spec.sizes(config.model.hidden_size)) // split
    return total
