"""Saving and loading a training run with Megatron's distributed checkpoints.

Weights and optimizer state are saved as whole tensors in model space, so that a run resumes at
other TP, PP, CP, DP and world sizes.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.training import checkpoint_files as files
from megatron_ttt.training.checkpoint_files import DamagedCheckpoint, Progress
from megatron_ttt.training.distributed import Ranks

# Layers differ (fast and plain ones), so each is stored under its own number; optimizer state is
# stored in the shape of the parameters, which alone loads at other TP and PP sizes.
METADATA = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}


def save(
    root: Path,
    progress: Progress,
    *,
    model: Any,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    ranks: Ranks,
    facts: dict[str, Any],
) -> Path:
    """Write one checkpoint; every rank calls it, and it is visible when it returns.

    Args:
        root: the run's ``checkpoints`` folder.
        progress: of the run.
        model: the stage inside DDP.
        facts: see :func:`checkpoint_files.publish`.
    """
    partial = files.partial_folder(root, progress.step)
    _on_first_rank(ranks, lambda: _empty(partial))
    model_state = model.sharded_state_dict(metadata=_metadata(ranks))
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=_metadata(ranks)),
        "scheduler": scheduler.state_dict(),
        "rng": _sharded_rng(ranks),
    }
    dist_checkpointing.save(state, str(partial), content_metadata=dict(METADATA))
    facts = {**facts, "layout": layout(ranks)}
    _on_first_rank(ranks, lambda: files.publish(root, progress, facts))
    return files.step_folder(root, progress.step)


def load(
    folder: Path,
    *,
    model: Any,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    ranks: Ranks,
    seed: int,
    progress: Progress,
    saved_layout: dict[str, int],
) -> None:
    """Restore weights, optimizer, schedule and random states from a verified folder.

    Random states are restored where the layout is the one they were saved under; otherwise each
    rank derives a new one from (seed, step, rank).
    """
    same_layout = saved_layout == layout(ranks)
    _prime_adam(optimizer)
    model_state = model.sharded_state_dict(metadata=_metadata(ranks))
    wanted: dict[str, Any] = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            model_state, is_loading=True, metadata=_metadata(ranks)
        ),
    }
    if same_layout:
        wanted["rng"] = _sharded_rng(ranks)
    state = dist_checkpointing.load(wanted, str(folder))
    model.load_state_dict(state["model"])
    with _step_left_alone(optimizer):
        optimizer.load_state_dict(state["optimizer"])
    _separate_steps(optimizer)
    scheduler.load_state_dict(state["scheduler"])
    if same_layout:
        _set_rng(state["rng"])
    else:
        torch.manual_seed(hash((seed, progress.step, ranks.rank)) % 2**63)


def load_weights(folder: Path, *, model: Any, optimizer: MegatronOptimizer, ranks: Ranks) -> None:
    """Start a new run from another run's weights; optimizer and schedule start afresh."""
    wanted = {"model": model.sharded_state_dict(metadata=_metadata(ranks))}
    state = dist_checkpointing.load(wanted, str(folder))
    model.load_state_dict(state["model"])
    optimizer.reload_model_params()


def newest(root: Path, ranks: Ranks, report: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint, ``None`` where none was ever completed.

    Damaged ones are reported, set aside and skipped.

    Raises:
        ConfigError: checkpoints exist, but none is good: starting again silently would overwrite
            what a person may still want to rescue.
    """
    return _from_first_rank(ranks, lambda: _newest(root, report))


def verified(folder: Path, ranks: Ranks) -> tuple[Progress, dict[str, Any]]:
    """Progress and facts of a folder, checked on one rank for all.

    Raises:
        DamagedCheckpoint: on every rank.
    """
    return _from_first_rank(ranks, lambda: files.verify(folder))


def layout(ranks: Ranks) -> dict[str, int]:
    """The sizes under which per-rank state is comparable."""
    groups = ranks.groups
    sizes = {"tp": groups.tp, "cp": groups.cp, "pp": groups.pp, "dp": groups.dp}
    return {"world": ranks.world_size, **{name: group.size() for name, group in sizes.items()}}


def _newest(root: Path, report: Callable[[str], None]) -> Path | None:
    folders = files.complete_folders(root)
    for folder in folders:
        try:
            files.verify(folder)
        except DamagedCheckpoint as error:
            aside = files.set_aside(folder)
            report(f"damaged checkpoint: {error}; kept as {aside.name}")
        else:
            return folder
    if folders or list(root.glob(f"step_*{files.DAMAGED}*")):
        raise ConfigError(
            [
                Fault(
                    "run.resume",
                    "auto",
                    f"no checkpoint in {root} is undamaged; "
                    "use run.resume=never with another run.dir to start again",
                )
            ]
        )
    return None


def _metadata(ranks: Ranks) -> dict[str, Any]:
    return {**METADATA, "dp_cp_group": ranks.groups.dp_cp}


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _on_first_rank(ranks: Ranks, action: Callable[[], Any]) -> None:
    _from_first_rank(ranks, lambda: (action(), None)[1])


def _from_first_rank(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """Run on rank 0 and hand its value, or its exception, to every rank: none is left waiting."""
    outcome: list[Any] = [None, None]
    if ranks.is_first:
        try:
            outcome[0] = action()
        except Exception as error:  # raised again below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=ranks.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


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


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def _prime_adam(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state it creates in its first step, so that there is one to load."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


@contextmanager
def _step_left_alone(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Megatron copies every entry of AdamW's state, but stores ``step`` elsewhere: hand it back."""
    undo = []
    for part in _parts(optimizer):
        original = part._set_main_param_and_optimizer_states

        def keeping_step(
            parameter: Tensor, tensors: dict[str, Tensor], part: Any = part, set_: Any = original
        ) -> None:
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            step = part.optimizer.state[main].get("step")
            set_(parameter, {**tensors, "step": step} if step is not None else tensors)

        part._set_main_param_and_optimizer_states = keeping_step
        undo.append(part)
    try:
        yield
    finally:
        for part in undo:
            del part._set_main_param_and_optimizer_states


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """One ``step`` tensor per parameter.

    Megatron assigns the same tensor to all of them, and AdamW increments it in place once per
    parameter.
    """
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].detach().clone()
