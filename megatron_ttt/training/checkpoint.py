"""What a training checkpoint holds, and how a run takes it back.

Weights and optimizer state are saved as whole tensors in model space with Megatron's distributed
checkpoints, so that a run resumes at other TP, PP, CP, DP and world sizes. How they get to disk
is told in ``checkpoint_saver.py``, what lies there in ``checkpoints/run_files.py``.
"""

import hashlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ttt.checkpoints import run_files as files
from megatron_ttt.checkpoints.manifest import DamagedCheckpoint, check_files, read_manifest
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.checkpoints.tensor_only import tensor_only
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import OptimizerForm
from megatron_ttt.training.distributed import Ranks
from megatron_ttt.training.optimizer_state import (
    bucket_sizes,
    load_optimizer,
    padding_between_buckets,
    prime_adam,
)
from megatron_ttt.training.resilience import agree, on_first_rank, reason
from megatron_ttt.training.whole_stage import whole_stage

_WORDS = 300  # of a library's complaint, which may list every tensor of the model


class UnfitCheckpoint(Exception):
    """An undamaged checkpoint does not hold what this model needs; the message says what."""


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint takes from a rank and gives back to it.

    Attributes:
        model: the pipeline stage in its DDP.
    """

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


@dataclass(frozen=True)
class Found:
    """An undamaged checkpoint: its folder, where the run stood, and what else its manifest says."""

    folder: Path
    progress: Progress
    facts: dict[str, Any]


def content(form: OptimizerForm) -> dict[str, Any]:
    """Return what Megatron is told of a checkpoint's content.

    Layers differ (fast and plain ones), so each is stored under its own number.
    """
    return {"non_homogeneous_layers": True, "distrib_optim_sharding_type": form.value}


def sharded_state(state: TrainingState, ranks: Ranks, form: OptimizerForm) -> dict[str, Any]:
    """Megatron's description of everything to save: tensors with their places in the whole."""
    model = whole_stage(state.model).sharded_state_dict(metadata=_metadata(ranks))
    with padding_between_buckets(state.optimizer):
        optimizer = state.optimizer.sharded_state_dict(model, metadata=_metadata(ranks, form))
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": state.scheduler.state_dict(),
        "rng": _sharded_rng(ranks),
    }


def load(found: Found, state: TrainingState, *, ranks: Ranks, seed: int) -> None:
    """Restore weights, optimizer, schedule and random states.

    Random states are restored where the layout is the one they were saved under; otherwise each
    rank derives a new one from (seed, step, rank).

    Raises:
        UnfitCheckpoint: the folder holds another model, or its optimizer in a form that does not
            load at this layout.
    """
    form = _form(found, state, ranks)
    same_layout = found.facts.get("layout") == layout(ranks)
    prime_adam(state.optimizer)
    model = state.model.module.sharded_state_dict(metadata=_metadata(ranks))
    optimizer = state.optimizer.sharded_state_dict(
        model, is_loading=True, metadata=_metadata(ranks, form)
    )
    wanted: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if same_layout:
        wanted["rng"] = _sharded_rng(ranks)
    loaded = _read(wanted, found.folder, ranks)
    state.model.module.load_state_dict(loaded["model"])
    load_optimizer(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _set_rng(loaded["rng"])
    else:
        words = f"{seed} {found.progress.step} {ranks.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:7], "big"))


def load_weights(folder: Path, state: TrainingState, *, ranks: Ranks) -> None:
    """Start a new run from another run's weights; optimizer and schedule start afresh.

    Raises:
        UnfitCheckpoint: the folder holds another model.
    """
    load_model(folder, state.model.module, ranks=ranks)
    state.optimizer.reload_model_params()


def load_model(folder: Path, model: Any, *, ranks: Ranks) -> None:
    """Weights alone, into a pipeline stage (inside DDP or not): what reading needs.

    Raises:
        UnfitCheckpoint: the folder holds another model.
    """
    wanted = {"model": model.sharded_state_dict(metadata=_metadata(ranks))}
    model.load_state_dict(_read(wanted, folder, ranks)["model"])


def newest(root: Path, ranks: Ranks, report: Callable[[str], None]) -> Found | None:
    """Return the newest undamaged checkpoint, ``None`` where none was ever completed.

    Damaged ones are reported, set aside and skipped.

    Raises:
        ConfigError: checkpoints exist, but none is good: starting again silently would overwrite
            what a person may still want to rescue.
    """
    folders = on_first_rank(ranks, lambda: files.complete_folders(root))
    for folder in folders:
        try:
            return verified(folder, ranks)
        except DamagedCheckpoint as error:
            aside = on_first_rank(ranks, partial(files.set_aside, folder))
            report(f"damaged checkpoint: {error}; kept as {aside.name}")
    damaged = on_first_rank(ranks, lambda: len(list(root.glob(f"step_*{files.DAMAGED}*"))))
    if damaged:
        advice = "use run.resume=never with another run.dir to start again"
        message = f"no checkpoint in {root} is undamaged; {advice}"
        raise ConfigError([Fault("run.resume", "auto", message)])
    return None


def verified(folder: Path, ranks: Ranks) -> Found:
    """Check a folder against its manifest; every rank reads its share of the files.

    Raises:
        DamagedCheckpoint: on every rank, naming the file.
    """
    manifest = on_first_rank(ranks, lambda: read_manifest(folder))
    damage = None
    try:
        check_files(folder, manifest.files, part=ranks.rank, parts=ranks.world_size)
    except DamagedCheckpoint as error:
        damage = error
    complaint = agree(ranks, damage)
    if complaint is not None:
        raise DamagedCheckpoint(complaint)
    return Found(folder, manifest.progress, manifest.facts)


def layout(ranks: Ranks) -> dict[str, int]:
    """Return the sizes under which per-rank state is comparable."""
    groups = ranks.groups
    sizes = {"tp": groups.tp, "cp": groups.cp, "pp": groups.pp, "dp": groups.dp}
    return {"world": ranks.world_size, **{name: group.size() for name, group in sizes.items()}}


def _read(wanted: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Fill in the wanted tensors; ranks with equal shares read each part once and pass it on."""
    older = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters
    if older and not (folder / "common.pt").is_file():
        own = version("megatron-core")
        raise UnfitCheckpoint(
            f"{folder}: has no common.pt: saved by a newer megatron-core than {own}, "
            "which cannot read it (the other way round works)"
        )
    strategy = get_default_load_sharded_strategy(str(folder))
    if ranks.groups.dp_cp.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, ranks.groups.dp_cp)
    try:
        with tensor_only():
            return dist_checkpointing.load(wanted, str(folder), strategy)
    except CheckpointException as error:  # wraps one exception per rank
        causes = sorted({reason(cause[0]) for cause in error.failures.values()})
        raise UnfitCheckpoint(f"{folder}: {causes[0][:_WORDS]}") from error
    except (CheckpointingException, KeyError, pickle.UnpicklingError) as error:
        raise UnfitCheckpoint(f"{folder}: {reason(error)[:_WORDS]}") from error


def _metadata(
    ranks: Ranks, form: OptimizerForm = OptimizerForm.fully_reshardable
) -> dict[str, Any]:
    return {**content(form), "dp_cp_group": ranks.groups.dp_cp}


def _form(found: Found, state: TrainingState, ranks: Ranks) -> OptimizerForm:
    """In which form the optimizer lies there, if that loads at this layout."""
    said = found.facts.get("optimizer", {"form": OptimizerForm.fully_reshardable.value})
    form = OptimizerForm(said["form"])
    if form is OptimizerForm.fully_reshardable:
        return form
    sizes = found.facts["layout"]
    before, now = ({key: place[key] for key in ("tp", "pp")} for place in (sizes, layout(ranks)))
    buckets = on_first_rank(ranks, lambda: bucket_sizes(state.optimizer))
    if before == now and said["buckets"] == buckets:
        return form
    differs = "gradient buckets (parallel.bucket_size, overlap_grad_reduce) are others"
    if before != now:
        differs = f"now tp={now['tp']} pp={now['pp']}"
    raise UnfitCheckpoint(
        f"{found.folder}: its optimizer was saved as {form.value}, with tp={before['tp']} "
        f"pp={before['pp']}, and loads with these alone: {differs}; the checkpoint after the last "
        "step and those of checkpoint.periodic=fully_reshardable load at any layout, and the "
        "weights alone do so with checkpoint.load"
    )


def _sharded_rng(ranks: Ranks) -> ShardedObject:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    state["tracker"] = dict(get_cuda_rng_tracker().get_states())
    return ShardedObject("rng", state, (ranks.world_size,), (ranks.rank,), replica_id=0)


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
