"""What types cannot say about a :class:`Config`: the checks between its fields, as pure functions.

:func:`validate` reads nothing but its arguments and returns every fault it finds. What needs files
(corpora, checkpoints, an earlier run in the same folder) is checked where the files are read.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megatron_ttt.config import derived
from megatron_ttt.config.faults import Fault
from megatron_ttt.config.schema import (
    AttentionBackend,
    ClipMode,
    Config,
    DataSource,
    Precision,
    Recompute,
    RopeScaling,
    TargetSource,
    TokenizerKind,
)
from megatron_ttt.parallel.layout import nearest_valid_lengths

# Submodules that both megatron-core lines can recompute in a dense model without latent attention.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")
CP_COMM_TYPES = ("p2p", "a2a", "all_gather")
BYTE_TOKENS = 258  # 256 bytes, end of document, padding


def validate(
    config: Config, world_size: int, *, cuda: bool, transformer_engine: bool = False
) -> list[Fault]:
    """Every fault of a composed configuration, in the order of the checks below.

    Args:
        config: complete (no ``MISSING`` left), of the right types.
        world_size: processes of the run.
        cuda: every process has a GPU.
        transformer_engine: the package ``transformer_engine`` is installed.
    """
    faults = [fault for check in _CHECKS for fault in check(config)]
    faults += _world_faults(config, world_size)
    faults += _device_faults(config, cuda=cuda, transformer_engine=transformer_engine)
    return faults


def _below(key: str, value: Any, least: float, *, exclusive: bool = False) -> Iterator[Fault]:
    """A fault if a number that is given (not null) is under its least valid value."""
    if value is None:
        return
    if exclusive and not value > least:
        yield Fault(key, value, f"must be above {least:g}")
    elif not exclusive and not value >= least:
        yield Fault(key, value, f"must be at least {least:g}")


def _positive_faults(config: Config) -> Iterator[Fault]:
    model, train, parallel = config.model, config.train, config.parallel
    counts = {
        "model.layers": model.layers,
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.heads": model.heads,
        "model.kv_groups": model.kv_groups,
        "model.head_dim": model.head_dim,
        "model.vocab_size": model.vocab_size,
        "model.max_positions": model.max_positions,
        "model.sliding_window": model.sliding_window,
        "ttt.chunk_size": config.ttt.chunk_size,
        "parallel.tp": parallel.tp,
        "parallel.cp": parallel.cp,
        "parallel.pp": parallel.pp,
        "parallel.timeout_s": parallel.timeout_s,
        "train.steps": train.steps,
        "train.seq_length": train.seq_length,
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size": train.global_batch_size,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "validation.interval": config.validation.interval,
        "validation.batches": config.validation.batches,
        "logging.interval": config.logging.interval,
    }
    for key, value in counts.items():
        yield from _below(key, value, 1)
    yield from _below("data.workers", config.data.workers, 0)
    yield from _below("train.seed", train.seed, 0)


def _model_faults(config: Config) -> Iterator[Fault]:
    model, rope = config.model, config.model.rope
    if model.kv_groups >= 1 and model.heads % model.kv_groups:
        yield Fault(
            "model.kv_groups", model.kv_groups, f"must divide model.heads={model.heads} evenly"
        )
    if model.head_dim % 2:
        yield Fault("model.head_dim", model.head_dim, "must be even: RoPE rotates pairs")
    yield from _below("model.norm_epsilon", model.norm_epsilon, 0, exclusive=True)
    yield from _below("model.initializer_range", model.initializer_range, 0, exclusive=True)
    yield from _below("model.rope.base", rope.base, 1, exclusive=True)
    if rope.scaling is RopeScaling.none and rope.factor != 1.0:
        yield Fault("model.rope.factor", rope.factor, "has no effect with model.rope.scaling=none")
    if rope.scaling is not RopeScaling.none:
        yield from _below("model.rope.factor", rope.factor, 1)
        yield from _below("model.rope.original_max_positions", rope.original_max_positions, 1)
    if rope.scaling is RopeScaling.llama3 and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        yield Fault(
            "model.rope.low_freq_factor",
            rope.low_freq_factor,
            f"must lie in (0, high_freq_factor={rope.high_freq_factor:g})",
        )
    if rope.scaling is RopeScaling.yarn and not 0 < rope.beta_slow < rope.beta_fast:
        yield Fault(
            "model.rope.beta_slow", rope.beta_slow, f"must lie in (0, beta_fast={rope.beta_fast:g})"
        )
    if config.train.seq_length > model.max_positions:
        yield Fault(
            "train.seq_length",
            config.train.seq_length,
            f"{model.name} has {model.max_positions} positions (model.max_positions); a longer"
            " context needs model.rope.scaling=yarn and more of them",
        )


def _ttt_faults(config: Config) -> Iterator[Fault]:
    ttt, layers = config.ttt, config.model.layers
    if ttt.layers is not None:
        for layer in ttt.layers:
            if not 0 <= layer < layers:
                message = f"{config.model.name} has no layer {layer}: layers are 0 to {layers - 1}"
                yield Fault("ttt.layers", ttt.layers, message)
        if len(set(ttt.layers)) != len(ttt.layers):
            yield Fault("ttt.layers", ttt.layers, "names a layer twice")
        if not ttt.layers:
            yield Fault("ttt.layers", ttt.layers, "is empty: choose layers, null or ttt=off")
    yield from _below("ttt.eta", ttt.eta, 0)
    if not 0 < ttt.decay <= 1:
        yield Fault("ttt.decay", ttt.decay, "must lie in (0, 1]; 1 keeps everything")
    if ttt.clip.mode is not ClipMode.off:
        yield from _below("ttt.clip.bound", ttt.clip.bound, 0, exclusive=True)
    if derived.reads_input_embeddings(config) and config.parallel.pp > 1:
        yield Fault(
            "ttt.target",
            ttt.target,
            f"later pipeline stages have no input embeddings: parallel.pp={config.parallel.pp}"
            f" must be 1, or ttt.target={TargetSource.hidden_states.name}",
        )


def _shard_faults(config: Config) -> Iterator[Fault]:
    """What tensor and pipeline parallelism must divide."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    shards = {
        "heads": model.heads,
        "kv_groups": model.kv_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "hidden_size": model.hidden_size,
    }
    uneven = [f"{key}={size}" for key, size in shards.items() if tp >= 1 and size % tp]
    if uneven:
        valid = ", ".join(str(divisor) for divisor in _common_divisors(list(shards.values())))
        message = f"does not divide model.{', '.join(uneven)}; valid for this model: {valid}"
        yield Fault("parallel.tp", tp, message)
    if derived.sequence_parallel(config.parallel) and tp == 1:
        yield Fault(
            "parallel.sequence_parallel", "on", "needs parallel.tp above 1; use auto or off"
        )
    if pp >= 1 and model.layers % pp:
        valid = ", ".join(str(divisor) for divisor in _common_divisors([model.layers]))
        yield Fault(
            "parallel.pp", pp, f"model.layers={model.layers} does not split evenly; valid: {valid}"
        )
    if config.parallel.cp_comm_type not in CP_COMM_TYPES:
        yield Fault(
            "parallel.cp_comm_type",
            config.parallel.cp_comm_type,
            f"must be one of {', '.join(CP_COMM_TYPES)}",
        )


def _common_divisors(numbers: list[int]) -> list[int]:
    smallest = min(numbers)
    return [d for d in range(1, smallest + 1) if all(number % d == 0 for number in numbers)]


def _sequence_faults(config: Config) -> Iterator[Fault]:
    """Chunks and ranks must tile the sequence; the nearest lengths that they do tile are named."""
    length, parallel = config.train.seq_length, config.parallel
    if min(length, parallel.cp, parallel.tp, config.ttt.chunk_size) < 1:
        return  # reported already
    tile = derived.cp_tile(config)
    if length % tile == 0:
        return
    parts = []
    if parallel.cp > 1:
        parts.append(f"parallel.cp={parallel.cp} ({parallel.cp_order.name})")
        if derived.ttt_layers(config):
            parts.append(f"ttt.chunk_size={config.ttt.chunk_size}")
    if derived.sequence_parallel(parallel):
        parts.append(f"parallel.tp={parallel.tp} with sequence parallelism")
    yield Fault(
        "train.seq_length",
        length,
        f"must be a multiple of {tile} for {', '.join(parts)}; nearest valid:"
        f" {_nearest(length, tile)}",
    )


def _nearest(size: int, unit: int) -> str:
    return " or ".join(str(number) for number in nearest_valid_lengths(size, unit))


def _optimizer_faults(config: Config) -> Iterator[Fault]:
    optimizer = config.optimizer
    yield from _below("optimizer.lr", optimizer.lr, 0)
    yield from _below("optimizer.min_lr", optimizer.min_lr, 0)
    if optimizer.min_lr > optimizer.lr >= 0:
        yield Fault("optimizer.min_lr", optimizer.min_lr, f"is above optimizer.lr={optimizer.lr:g}")
    if not 0 <= optimizer.warmup_fraction < 1:
        yield Fault("optimizer.warmup_fraction", optimizer.warmup_fraction, "must lie in [0, 1)")
    yield from _below("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    if optimizer.warmup_steps is not None and optimizer.warmup_steps >= config.train.steps:
        yield Fault(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"must be below train.steps={config.train.steps}",
        )
    yield from _below("optimizer.weight_decay", optimizer.weight_decay, 0)
    yield from _below("optimizer.clip_grad", optimizer.clip_grad, 0)
    yield from _below("optimizer.epsilon", optimizer.epsilon, 0, exclusive=True)
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield Fault(f"optimizer.{name}", getattr(optimizer, name), "must lie in [0, 1)")


def _train_faults(config: Config) -> Iterator[Fault]:
    train, parallel = config.train, config.parallel
    if train.recompute is Recompute.selective:
        unknown = [name for name in train.recompute_modules if name not in RECOMPUTE_MODULES]
        if unknown or not train.recompute_modules:
            yield Fault(
                "train.recompute_modules",
                train.recompute_modules,
                f"must name some of {', '.join(RECOMPUTE_MODULES)}",
            )
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield Fault(
            "parallel.overlap_param_gather", True, "needs parallel.distributed_optimizer=true"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Fault(
            "parallel.overlap_param_gather", True, "needs parallel.overlap_grad_reduce=true"
        )
    if parallel.bucket_size is not None:
        if not parallel.overlap_grad_reduce:
            yield Fault(
                "parallel.bucket_size",
                parallel.bucket_size,
                "needs parallel.overlap_grad_reduce=true: without it all is reduced at once",
            )
        yield from _below("parallel.bucket_size", parallel.bucket_size, 1)
    if not config.run.resume:
        yield Fault("run.resume", "''", "must be never, auto or the path of a checkpoint folder")
    if config.logging.peak_tflops_per_device is not None:
        peak = config.logging.peak_tflops_per_device
        yield from _below("logging.peak_tflops_per_device", peak, 0, exclusive=True)


def _data_faults(config: Config) -> Iterator[Fault]:
    data, vocabulary = config.data, config.model.vocab_size
    if data.tokenizer.kind is TokenizerKind.bytes and vocabulary < BYTE_TOKENS:
        yield Fault(
            "model.vocab_size",
            vocabulary,
            f"data.tokenizer.kind=bytes has {BYTE_TOKENS} tokens"
            " (256 bytes, end of document, padding)",
        )
    if (
        data.source is DataSource.python_stdlib
        and data.tokenizer.kind is TokenizerKind.huggingface
        and data.tokenizer.name is None
    ):
        yield Fault(
            "data.tokenizer.name",
            None,
            "data.tokenizer.kind=huggingface needs the name or the folder of a tokenizer"
            " (or data.tokenizer.kind=bytes)",
        )
    if data.source is DataSource.files and data.path is None and not config.run.dry_run:
        yield Fault(
            "data.path",
            None,
            "name the corpus: data.path=PREFIX of a .bin/.idx pair from tools/preprocess_data.py"
            " (or data=python_stdlib)",
        )
    shares = data.split.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) < 0 or numbers[0] <= 0:
        yield Fault(
            "data.split", data.split, "must be three shares train,validation,test such as 99,1,0"
        )
    elif config.validation.interval is not None and numbers[1] == 0:
        yield Fault(
            "data.split",
            data.split,
            f"leaves nothing to validate on, and validation.interval={config.validation.interval}",
        )


def _world_faults(config: Config, world_size: int) -> list[Fault]:
    """What depends on the number of processes."""
    parallel, train = config.parallel, config.train
    sizes = (parallel.tp, parallel.cp, parallel.pp, train.micro_batch_size, train.global_batch_size)
    if min(sizes) < 1:
        return []
    size = derived.model_parallel_size(parallel)
    if world_size % size:
        product = f"parallel.tp={parallel.tp} * cp={parallel.cp} * pp={parallel.pp} = {size}"
        return [
            Fault(
                "world_size",
                world_size,
                f"{product} does not divide it; start {_nearest(world_size, size)} processes",
            )
        ]
    rows = train.micro_batch_size * derived.data_parallel_size(config, world_size)
    if train.global_batch_size % rows:
        message = (
            f"must be a multiple of train.micro_batch_size={train.micro_batch_size} times"
            f" {rows // train.micro_batch_size} data-parallel ranks; nearest valid:"
            f" {_nearest(train.global_batch_size, rows)}"
        )
        return [Fault("train.global_batch_size", train.global_batch_size, message)]
    return []


def _device_faults(config: Config, *, cuda: bool, transformer_engine: bool) -> Iterator[Fault]:
    train = config.train
    recomputed = train.recompute_modules if train.recompute is Recompute.selective else []
    if "layernorm" in recomputed and not transformer_engine:
        yield Fault(
            "train.recompute_modules",
            recomputed,
            "layernorm needs the package transformer_engine, which Megatron-core asks for its"
            " state there; use core_attn, mlp",
        )
    """What depends on the machine."""
    if config.train.precision is Precision.bf16 and not cuda:
        yield Fault("train.precision", config.train.precision, "needs a GPU; use auto or fp32")
    backend = config.model.attention
    if backend is not AttentionBackend.transformer_engine:
        return
    if not cuda:
        yield Fault("model.attention", backend, "needs a GPU; use auto or torch")
    elif not transformer_engine:
        yield Fault(
            "model.attention",
            backend,
            "the package transformer_engine is not installed; use auto or torch",
        )
    if min(config.parallel.tp, config.parallel.cp) < 1:
        return  # reported already
    limit = derived.transformer_engine_limit(config)
    if limit is not None:
        yield Fault("model.attention", backend, f"{limit}; use auto or torch")


_CHECKS: tuple[Callable[[Config], Iterator[Fault]], ...] = (
    _positive_faults,
    _model_faults,
    _ttt_faults,
    _shard_faults,
    _sequence_faults,
    _optimizer_faults,
    _train_faults,
    _data_faults,
)
