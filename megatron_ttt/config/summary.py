"""What a configuration amounts to, by arithmetic alone: the dry run. Builds nothing.

Sizes follow Hugging Face's shapes (unpadded vocabulary).
"""

from dataclasses import dataclass
from math import prod

from megatron_ttt.config import derived
from megatron_ttt.config.faults import Fault
from megatron_ttt.config.flops import training_flops_per_token
from megatron_ttt.config.schema import AttentionBackend, Config, Trainable
from megatron_ttt.parallel.layout import token_ranges
from megatron_ttt.rule import added_parameters
from megatron_ttt.scan_words import SequenceOrder

STATE_BYTES = 4  # fp32
LEAST_BYTES = 2  # of a number that is computed with: bf16


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of the whole model, over all ranks.

    Attributes:
        total: every trained parameter, those of the target generators included.
        fast: elements of the fast weights, that is of the chosen layers' down projections; they
            are part of the pretrained model.
        added: elements of the target generators, which the pretrained model lacks.
    """

    total: int
    fast: int
    added: int


def parameter_counts(config: Config) -> ParameterCounts:
    """Count the parameters that ``model/build.py`` would build, padded vocabulary apart."""
    model, ttt = config.model, config.ttt
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    projected = (model.heads + 2 * model.kv_groups) * model.head_dim
    layer = hidden * projected + model.heads * model.head_dim * hidden + 3 * hidden * ffn
    layer += 2 * hidden  # norms
    layer += projected * model.attention_bias + 2 * model.head_dim * model.qk_norm
    embeddings = model.vocab_size * hidden * (1 if model.tied_embeddings else 2)
    fast_layers = len(derived.ttt_layers(config))
    added = fast_layers * sum(prod(spec.sizes(hidden)) for spec in added_parameters(ttt).values())
    total = model.layers * layer + embeddings + hidden + added
    return ParameterCounts(total=total, fast=fast_layers * hidden * ffn, added=added)


def state_bytes(config: Config) -> int:
    """Bytes of one layer's state, fp32, on one tensor-parallel rank and for one batch row."""
    model = config.model
    return STATE_BYTES * model.hidden_size * model.ffn_hidden_size // config.parallel.tp


def memory_faults(config: Config, memory: int) -> list[Fault]:
    """Faults of what cannot fit whatever else is done: an allocation would fail much later.

    Args:
        config: a valid configuration.
        memory: of this machine, bytes.
    """
    parallel, train, model = config.parallel, config.train, config.model
    weights = LEAST_BYTES * parameter_counts(config).total // (parallel.tp * parallel.pp)
    logits = LEAST_BYTES * train.micro_batch_size * train.seq_length * model.vocab_size
    logits //= parallel.tp * parallel.cp
    has = f"this machine has {memory / 1e9:,.0f} GB"
    faults = []
    if weights > memory:
        message = f"its weights are {weights / 1e9:,.0f} GB on each rank, {has}"
        faults.append(Fault("model.name", model.name, message))
    if logits > memory:
        message = (
            f"with train.seq_length={train.seq_length} the logits of a micro-batch are"
            f" {logits / 1e9:,.0f} GB on each rank, {has}"
        )
        faults.append(Fault("train.micro_batch_size", train.micro_batch_size, message))
    return faults


def summarize(config: Config, world_size: int) -> str:
    """Return the text of the dry run.

    Args:
        config: a valid configuration.
        world_size: processes; ``tp * cp * pp`` divides it.
    """
    sections = (
        _model_lines(config),
        _fast_weight_lines(config),
        _rank_lines(config, world_size),
        _batch_lines(config, world_size),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def _model_lines(config: Config) -> list[str]:
    counts, model = parameter_counts(config), config.model
    attention = f"{model.attention.name} (asked for)"
    if model.attention is AttentionBackend.auto:
        limit = derived.transformer_engine_limit(config)
        attention = "transformer_engine on GPUs where it is installed, else torch"
        if limit is not None:
            attention = f"torch (transformer_engine: {limit})"
    return [
        f"model         {model.name}: {model.layers} layers, hidden {model.hidden_size},"
        f" ffn {model.ffn_hidden_size}, {model.heads} heads, {model.kv_groups} kv groups",
        f"parameters    total {counts.total:,}, fast {counts.fast:,}, added {counts.added:,}",
        f"training      {training_flops_per_token(config) / 1e12:.4g} TFLOP per token"
        f" at sequence length {config.train.seq_length:,}",
        f"attention     {attention}",
        *_trained_lines(config),
    ]


def _trained_lines(config: Config) -> list[str]:
    part = config.train.trainable
    if part is Trainable.all:
        return []
    words = {
        Trainable.fast_layers: "the layers with fast weights",
        Trainable.target_generator: "what fast weights add to the model",
    }
    return [f"trains        {words[part]}; everything else stays as it is"]


def _fast_weight_lines(config: Config) -> list[str]:
    layers, ttt = derived.ttt_layers(config), config.ttt
    if not layers:
        return ["fast weights  none (ttt=off)"]
    chunks = -(-config.train.seq_length // ttt.chunk_size)
    factor, warmup = config.optimizer.target_lr_factor, config.train.eta_warmup_steps
    rates = [f"target rate   {factor:g} times the learning rate"] if factor != 1 else []
    rates += [f"eta           rises over {warmup} steps"] if warmup else []
    return [
        f"fast weights  layers {', '.join(map(str, layers))}",
        f"update        eta {ttt.eta:g}, normalize {ttt.normalize.name}, target {ttt.target.name},"
        f" convolution {ttt.conv.name}, clip {ttt.clip.mode.name}, decay {ttt.decay:g}",
        *rates,
        f"chunks        {chunks} of {ttt.chunk_size} tokens a sequence",
        f"state         {state_bytes(config):,} bytes per layer and row"
        f" (fp32, on each of {config.parallel.tp} tp ranks)",
    ]


def _rank_lines(config: Config, world_size: int) -> list[str]:
    parallel = config.parallel
    order = parallel.cp_order
    length = config.train.seq_length
    lines = [
        f"ranks         {world_size} = tp {parallel.tp} * cp {parallel.cp} * pp {parallel.pp}"
        f" * dp {derived.data_parallel_size(config, world_size)}"
        f"{', sequence parallel' if derived.sequence_parallel(parallel) else ''}",
        f"spans         {'two' if parallel.cp_order is SequenceOrder.zigzag else 'one'} a cp rank"
        f" ({order.value})"
        if parallel.cp > 1
        else "spans         one, the whole sequence",
    ]
    for rank in range(parallel.cp):
        ranges = token_ranges(rank, parallel.cp, order, length)
        text = ", ".join(f"{start:,}-{end - 1:,}" for start, end in ranges)
        lines.append(f"  cp rank {rank:<4}tokens {text}")
    return lines


def _batch_lines(config: Config, world_size: int) -> list[str]:
    train = config.train
    tokens = train.global_batch_size * train.seq_length
    return [
        f"batch         {train.global_batch_size} rows of {train.seq_length:,} tokens"
        f" = {tokens:,} tokens a step",
        f"micro-batches {derived.micro_batches(config, world_size)} of {train.micro_batch_size}"
        f" rows on each of {derived.data_parallel_size(config, world_size)} dp ranks",
        f"steps         {train.steps:,}, warm-up {derived.warmup_steps(config):,}:"
        f" {train.steps * tokens:,} tokens,"
        f" {train.steps * tokens * training_flops_per_token(config):.3g} FLOP",
    ]
