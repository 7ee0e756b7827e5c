"""What types cannot say about a :class:`Config`: the checks between its fields, as pure functions.

:func:`validate` reads nothing but its arguments and returns every fault it finds. What needs files
(corpora, checkpoints, an earlier run in the same folder) is checked where the files are read.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from megatron_ttt.config import derived
from megatron_ttt.config.bounds import (
    INT32,
    TRAINING_BOUNDS,
    bound_faults,
    flat_values,
)
from megatron_ttt.config.data_faults import data_faults
from megatron_ttt.config.faults import Fault
from megatron_ttt.config.schema import (
    AttentionBackend,
    ComputeConfig,
    Config,
    ParallelConfig,
    Recompute,
    RopeScaling,
    Trainable,
)
from megatron_ttt.parallel.layout import nearest_valid_lengths
from megatron_ttt.rule import TargetSource, kernel_complaint

# Submodules that both megatron-core lines can recompute in a dense model without latent attention.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")
CP_COMM_TYPES = ("p2p", "a2a", "all_gather")
MOST_SAMPLES = 2**40  # far beyond every corpus; their numbers stay in 64 bits whatever is added
_NEVER = ("no", "off", "false", "none", "null", "0", "n")  # what is typed instead of never
_NOT_IN_WANDB = "/\\#?%:"  # wandb refuses them in the name of a project
_LONGEST_IN_WANDB = 128


def validate(
    config: Config, world_size: int, *, cuda: bool, transformer_engine: bool = False
) -> list[Fault]:
    """Every fault of a composed configuration, in the order of the schema.

    Args:
        config: complete (no ``MISSING`` left), of the right types.
        world_size: processes of the run.
        cuda: every process has a GPU.
        transformer_engine: the package ``transformer_engine`` is installed.
    """

    def between(config: Config) -> Iterator[Fault]:
        for check in (_optimizer_faults, _train_faults, _run_faults, data_faults):
            yield from check(config)
        yield from _batch_faults(config, world_size)
        yield from _overlap_faults(config.parallel, cuda=cuda)

    return _all_faults(config, world_size, cuda, transformer_engine, between)


def compute_faults(config: ComputeConfig, world_size: int, *, cuda: bool) -> list[Fault]:
    """Every fault of what is computed where nothing is trained; else as :func:`validate`."""
    return _all_faults(config, world_size, cuda, False, lambda config: iter(()))


_Config = TypeVar("_Config", bound=ComputeConfig)


def _all_faults(
    config: _Config,
    world_size: int,
    cuda: bool,
    transformer_engine: bool,
    others: Callable[[_Config], Iterator[Fault]],
) -> list[Fault]:
    faults = _once(bound_faults(config, TRAINING_BOUNDS))
    wrong = {fault.key for fault in faults}
    if any(isinstance(fault.value, int) for fault in faults):
        return faults  # the checks below divide by some of these counts and go through others
    found = [fault for check in _COMPUTE_CHECKS for fault in check(config)]
    found += _world_faults(config, world_size)
    found += _device_faults(config, cuda=cuda, transformer_engine=transformer_engine)
    faults += [fault for fault in [*found, *others(config)] if fault.key not in wrong]
    order = [key for key, _ in flat_values(config)]  # what is of no single key comes last
    return sorted(faults, key=lambda f: order.index(f.key) if f.key in order else len(order))


def _once(faults: list[Fault]) -> list[Fault]:
    """Without what follows from another: run.dir is built of run.name, and that of model.name."""
    keys = {fault.key for fault in faults}
    follows = {"run.dir": {"run.name", "model.name"}, "run.name": {"model.name"}}
    return [fault for fault in faults if not follows.get(fault.key, set()) & keys]


def _model_faults(config: ComputeConfig) -> Iterator[Fault]:
    model, rope = config.model, config.model.rope
    if model.kv_groups >= 1 and model.heads % model.kv_groups:
        yield Fault(
            "model.kv_groups", model.kv_groups, f"must divide model.heads={model.heads} evenly"
        )
    if model.head_dim % 2:
        yield Fault("model.head_dim", model.head_dim, "must be even: RoPE rotates pairs")
    if rope.scaling is RopeScaling.none and rope.factor != 1.0:
        yield Fault("model.rope.factor", rope.factor, "has no effect with model.rope.scaling=none")
    if rope.scaling is not RopeScaling.none and rope.factor < 1:
        yield Fault("model.rope.factor", rope.factor, "must be at least 1")
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
            " context needs more of them, stretched (model.rope.scaling=yarn) or as they are",
        )


def _ttt_faults(config: ComputeConfig) -> Iterator[Fault]:
    ttt, layers = config.ttt, config.model.layers
    if ttt.layers is not None:
        beyond = [layer for layer in ttt.layers if not 0 <= layer < layers]
        if beyond:
            absent = ", ".join(map(str, beyond[:8]))
            message = f"{config.model.name} has no layer {absent}: layers are 0 to {layers - 1}"
            yield Fault("ttt.layers", ttt.layers, message)
        if len(set(ttt.layers)) != len(ttt.layers):
            yield Fault("ttt.layers", ttt.layers, "names a layer twice")
        if not ttt.layers:
            yield Fault("ttt.layers", ttt.layers, "is empty: choose layers, null or ttt=off")
    complaint = kernel_complaint(ttt.conv.value, ttt.kernel_size)
    if ttt.conv.is_learned and complaint is not None:
        yield Fault("ttt.kernel_size", ttt.kernel_size, complaint)
    if derived.reads_input_embeddings(config) and config.parallel.pp > 1:
        yield Fault(
            "ttt.target",
            ttt.target,
            f"later pipeline stages have no input embeddings: parallel.pp={config.parallel.pp}"
            f" must be 1, or ttt.target={TargetSource.hidden_states.name}",
        )


def _shard_faults(config: ComputeConfig) -> Iterator[Fault]:
    """Yield what tensor and pipeline parallelism must divide."""
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


def _sequence_faults(config: ComputeConfig) -> Iterator[Fault]:
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
    if optimizer.min_lr > optimizer.lr >= 0:
        yield Fault("optimizer.min_lr", optimizer.min_lr, f"is above optimizer.lr={optimizer.lr:g}")
    if optimizer.warmup_steps is not None and optimizer.warmup_steps >= config.train.steps:
        yield Fault(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"must be below train.steps={config.train.steps}",
        )
    elif not (0 <= optimizer.warmup_fraction < 1 and 0 < optimizer.decay_fraction <= 1):
        return  # bounds.py says so; there are no steps to compare
    elif derived.decay_steps(config) <= derived.warmup_steps(config) < config.train.steps:
        message = (
            f"ends the decay at step {derived.decay_steps(config)} of {config.train.steps}, not"
            f" after warm-up, which takes {derived.warmup_steps(config)}"
        )
        yield Fault("optimizer.decay_fraction", optimizer.decay_fraction, message)


def _train_faults(config: Config) -> Iterator[Fault]:
    train = config.train
    if train.recompute is Recompute.selective:
        unknown = [name for name in train.recompute_modules if name not in RECOMPUTE_MODULES]
        if unknown or not train.recompute_modules:
            yield Fault(
                "train.recompute_modules",
                train.recompute_modules,
                f"must name some of {', '.join(RECOMPUTE_MODULES)}",
            )
    if train.eta_warmup_steps > train.steps:
        message = f"must be at most train.steps={train.steps}, or eta never reaches ttt.eta"
        yield Fault("train.eta_warmup_steps", train.eta_warmup_steps, message)
    if train.trainable is not Trainable.all and not derived.ttt_layers(config):
        yield Fault("train.trainable", train.trainable, "needs fast weights: ttt=off has none")
    if train.trainable is not Trainable.all and config.parallel.pp > 1:
        message = (
            f"a pipeline stage without a trained layer has no backward: parallel.pp="
            f"{config.parallel.pp} must be 1"
        )
        yield Fault("train.trainable", train.trainable, message)
    tokens = train.micro_batch_size * train.seq_length
    if tokens > INT32:
        yield Fault(
            "train.micro_batch_size",
            train.micro_batch_size,
            f"times train.seq_length={train.seq_length} is {tokens} tokens in a micro-batch,"
            f" at most {INT32}",
        )
    samples = train.steps * train.global_batch_size
    if samples > MOST_SAMPLES:
        yield Fault(
            "train.steps",
            train.steps,
            f"times train.global_batch_size={train.global_batch_size} is {samples} samples,"
            f" at most {MOST_SAMPLES}",
        )


def _run_faults(config: Config) -> Iterator[Fault]:
    run, logging = config.run, config.logging
    if any(part in (".", "..") for part in run.name.split("/")):
        yield Fault("run.name", run.name, "names a folder of outputs/: give run.dir for another")
    if not run.resume.strip():
        message = "must be never, auto or the path of a checkpoint folder"
        yield Fault("run.resume", "''", message)
    elif run.resume.lower() in _NEVER:
        message = "must be never, auto or the path of a checkpoint folder; did you mean never?"
        yield Fault("run.resume", run.resume, message)
    for name in ("wandb_project", "wandb_entity"):
        text = getattr(logging, name)
        if text is not None and (set(text) & set(_NOT_IN_WANDB) or len(text) > _LONGEST_IN_WANDB):
            yield Fault(
                f"logging.{name}",
                text,
                f"must be at most {_LONGEST_IN_WANDB} characters without any of {_NOT_IN_WANDB}",
            )


def _world_faults(config: ComputeConfig, world_size: int) -> Iterator[Fault]:
    """Yield what the number of processes does not fit."""
    parallel = config.parallel
    size = derived.model_parallel_size(parallel)
    if size >= 1 and world_size % size:
        product = f"parallel.tp={parallel.tp} * cp={parallel.cp} * pp={parallel.pp} = {size}"
        message = f"{product} does not divide it; start {_nearest(world_size, size)} processes"
        yield Fault("world_size", world_size, message)


def _batch_faults(config: Config, world_size: int) -> Iterator[Fault]:
    """Yield a global batch that the data-parallel ranks cannot share."""
    parallel, train = config.parallel, config.train
    sizes = (parallel.tp, parallel.cp, parallel.pp, train.micro_batch_size, train.global_batch_size)
    if min(sizes) < 1 or world_size % derived.model_parallel_size(parallel):
        return
    rows = train.micro_batch_size * derived.data_parallel_size(config, world_size)
    if train.global_batch_size % rows:
        message = (
            f"must be a multiple of train.micro_batch_size={train.micro_batch_size} times"
            f" {rows // train.micro_batch_size} data-parallel ranks; nearest valid:"
            f" {_nearest(train.global_batch_size, rows)}"
        )
        yield Fault("train.global_batch_size", train.global_batch_size, message)


def _overlap_faults(parallel: ParallelConfig, *, cuda: bool) -> Iterator[Fault]:
    """Yield what is asked to travel in the background and cannot."""
    found = derived.overlap(parallel, cuda=cuda)
    if found.param_gather and not parallel.distributed_optimizer:
        needed = "needs parallel.distributed_optimizer=true"
        yield Fault("parallel.overlap_param_gather", True, needed)
    needed = "needs parallel.overlap_grad_reduce=true"
    if found.param_gather and not found.grad_reduce:
        yield Fault("parallel.overlap_param_gather", True, needed)
    if parallel.bucket_size is not None and not found.grad_reduce:
        needed += ": without it all is reduced at once"
        yield Fault("parallel.bucket_size", parallel.bucket_size, needed)


def _device_faults(
    config: ComputeConfig, *, cuda: bool, transformer_engine: bool
) -> Iterator[Fault]:
    """Yield what depends on the machine."""
    train = config.train
    recomputed = train.recompute_modules if train.recompute is Recompute.selective else []
    if "layernorm" in recomputed and not transformer_engine:
        yield Fault(
            "train.recompute_modules",
            recomputed,
            "layernorm needs the package transformer_engine, which Megatron-core asks for its"
            " state there; use core_attn, mlp",
        )
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


_COMPUTE_CHECKS: tuple[Callable[[ComputeConfig], Iterator[Fault]], ...] = (
    _model_faults,
    _ttt_faults,
    _shard_faults,
    _sequence_faults,
)
