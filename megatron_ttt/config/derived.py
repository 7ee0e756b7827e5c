"""What follows from a :class:`Config`: the values that ``auto`` and ``null`` stand for.

Everything that needs such a value asks here, so that the dry run, the checks, the model and the
training loop cannot disagree. Pure arithmetic, no torch.
"""

import math
from dataclasses import dataclass

from megatron_ttt.config.schema import (
    AttentionBackend,
    ComputeConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    Precision,
    RopeConfig,
    RopeScaling,
    Toggle,
    TTTMode,
)
from megatron_ttt.rule import TargetSource, default_layers
from megatron_ttt.scan_words import SequenceOrder


@dataclass(frozen=True)
class Resolution:
    """A resolved choice and the reason, for the reader of the dry run and of the log."""

    value: AttentionBackend
    reason: str


def ttt_layers(config: ComputeConfig) -> list[int]:
    """Layers (from 0, ascending) whose down projection is a fast weight; empty for ``ttt=off``."""
    if config.ttt.mode is TTTMode.off:
        return []
    if config.ttt.layers is None:
        return default_layers(config.model.layers)
    return sorted(config.ttt.layers)


def reads_input_embeddings(config: ComputeConfig) -> bool:
    """Whether the target generator needs the input embeddings."""
    return bool(ttt_layers(config)) and config.ttt.target is TargetSource.input_embeddings


def unread_writes(config: ComputeConfig) -> str | None:
    """Return a notice where rows are too short for fast weights to be read at all, else ``None``.

    A chunk reads what earlier chunks wrote: a row of one chunk reads nothing.
    """
    length, chunk_size = config.train.seq_length, config.ttt.chunk_size
    if not ttt_layers(config) or length > chunk_size:
        return None
    return (
        f"notice: ttt.chunk_size={chunk_size}: a row of {length} tokens is one chunk, so nothing"
        " that fast weights write is ever read; give a smaller one, or longer rows"
    )


def sequence_parallel(parallel: ParallelConfig) -> bool:
    """``auto`` means on as soon as there is tensor parallelism."""
    if parallel.sequence_parallel is Toggle.auto:
        return parallel.tp > 1
    return parallel.sequence_parallel is Toggle.on


@dataclass(frozen=True)
class Overlap:
    """What travels while something else is computed."""

    grad_reduce: bool
    param_gather: bool


def overlap(parallel: ParallelConfig, *, cuda: bool) -> Overlap:
    """Return what ``null`` stands for: both on a GPU, neither without one.

    Parameters are gathered only where data-parallel ranks share the optimizer.
    """
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    reduce = cuda if reduce is None else reduce
    if gather is None:
        gather = cuda and reduce and parallel.distributed_optimizer
    return Overlap(reduce, gather)


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the model and one sequence: ``tp * cp * pp``."""
    return parallel.tp * parallel.cp * parallel.pp


def data_parallel_size(config: ComputeConfig, world_size: int) -> int:
    """Return copies of the model, that is micro-batches processed at the same time."""
    return world_size // model_parallel_size(config.parallel)


def micro_batches(config: Config, world_size: int) -> int:
    """Micro-batches that one data-parallel rank accumulates in a step."""
    rows_at_once = config.train.micro_batch_size * data_parallel_size(config, world_size)
    return config.train.global_batch_size // rows_at_once


def warmup_steps(config: Config) -> int:
    """Return steps over which the learning rate rises from 0."""
    if config.optimizer.warmup_steps is not None:
        return config.optimizer.warmup_steps
    return round(config.optimizer.warmup_fraction * config.train.steps)


def eta_factor(config: Config, step: int) -> float:
    """Return the share of ``ttt.eta`` that a step writes and reads with; steps count from 1."""
    return min(1.0, step / max(config.train.eta_warmup_steps, 1))


def decay_steps(config: Config) -> int:
    """Step from which on the learning rate stays at ``optimizer.min_lr``."""
    return round(config.optimizer.decay_fraction * config.train.steps)


def padded_vocab_size(model: ModelConfig, tp: int) -> int:
    """Rows of the embedding and of the output layer: the vocabulary rounded up to whole shards.

    The rows beyond ``model.vocab_size`` are not tokens: they are masked out of every softmax.
    """
    return -(-model.vocab_size // tp) * tp


def scan_timeout_s(parallel: ParallelConfig) -> float:
    """After how long the scan's own watchdog gives up: before ``parallel.timeout_s`` is over.

    Then NCCL's watchdog ends the process, with a message that knows neither layer nor algorithm.
    """
    return 0.9 * parallel.timeout_s


def cp_tile(config: ComputeConfig) -> int:
    """Return the sequence length must be a multiple of this.

    A context-parallel rank holds two spans (zigzag) or one (contiguous), every span holds whole
    chunks, and with sequence parallelism every rank's tokens split evenly over tp. With cp = 1 any
    number of chunks will do, the last one unfinished.
    """
    parallel = config.parallel
    tile = 1
    if parallel.cp > 1:
        spans = 2 * parallel.cp if parallel.cp_order is SequenceOrder.zigzag else parallel.cp
        tile = spans * (config.ttt.chunk_size if ttt_layers(config) else 1)
    if sequence_parallel(parallel):
        tile = math.lcm(tile, parallel.cp * parallel.tp)
    return tile


def resolve_precision(precision: Precision, *, cuda: bool) -> Precision:
    """``auto``: bf16 on a GPU, fp32 without one."""
    if precision is Precision.auto:
        return Precision.bf16 if cuda else Precision.fp32
    return precision


def transformer_engine_limit(config: ComputeConfig) -> str | None:
    """Why Transformer Engine's attention cannot compute this configuration, or ``None``."""
    if config.parallel.cp == 1:
        if config.data.reset_attention:
            return "document masks (data.reset_attention=true) are only in the torch backend"
        return None
    if config.data.reset_attention:
        return (
            "its context parallelism cuts zigzag per document, which does not fit"
            " data.reset_attention=true"
        )
    if config.parallel.cp_order is SequenceOrder.contiguous:
        return "its context parallelism knows only parallel.cp_order=zigzag"
    if config.model.sliding_window is not None and config.parallel.cp_comm_type != "a2a":
        return "with a sliding window its context parallelism needs parallel.cp_comm_type=a2a"
    groups = config.model.kv_groups // config.parallel.tp
    if config.parallel.cp_comm_type == "a2a" and groups % config.parallel.cp:
        return (
            f"parallel.cp_comm_type=a2a deals {groups} kv groups (per tp rank) to"
            f" parallel.cp={config.parallel.cp} ranks"
        )
    return None


def resolve_attention(config: ComputeConfig, *, cuda: bool, transformer_engine: bool) -> Resolution:
    """Return the attention backend of a run, and why.

    Args:
        cuda: a GPU is present.
        transformer_engine: the package ``transformer_engine`` is installed.
    """
    if config.model.attention is not AttentionBackend.auto:
        return Resolution(config.model.attention, "asked for")
    if not cuda:
        return Resolution(AttentionBackend.torch, "no GPU")
    if not transformer_engine:
        return Resolution(AttentionBackend.torch, "transformer_engine is not installed")
    limit = transformer_engine_limit(config)
    if limit is not None:
        return Resolution(AttentionBackend.torch, f"transformer_engine: {limit}")
    return Resolution(AttentionBackend.transformer_engine, "a GPU and transformer_engine are there")


def attention_factor(rope: RopeConfig) -> float:
    """Return what YaRN multiplies queries and keys with: ``0.1 ln(factor) + 1``; 1 without YaRN.

    YaRN (arXiv 2309.00071), section 3.3.
    """
    if rope.scaling is RopeScaling.yarn and rope.factor > 1:
        return 0.1 * math.log(rope.factor) + 1.0
    return 1.0
