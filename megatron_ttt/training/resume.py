"""Where a run begins: at its own newest checkpoint, at one that was named, or at step 0."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ttt.checkpoints import run_files as files
from megatron_ttt.checkpoints.manifest import MANIFEST
from megatron_ttt.checkpoints.progress import BEGINNING, Progress
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import HF_SCHEME, Config
from megatron_ttt.conversion.loading import load_hf_weights
from megatron_ttt.conversion.manifest import check_start
from megatron_ttt.files import sync_file
from megatron_ttt.training import checkpoint
from megatron_ttt.training.changes import check_changes
from megatron_ttt.training.checkpoint import Found, TrainingState
from megatron_ttt.training.distributed import Ranks
from megatron_ttt.training.resilience import agree, on_first_rank
from megatron_ttt.training.schedule import fit_schedule


def weights_follow(config: Config, ranks: Ranks) -> bool:
    """Whether :func:`start` loads weights (or refuses to start): then none need to be drawn."""
    if config.checkpoint.load is not None or config.run.resume not in ("auto", "never"):
        return True
    root = Path(config.run.dir) / "checkpoints"
    resumes = config.run.resume == "auto"
    return resumes and on_first_rank(ranks, lambda: bool(files.complete_folders(root)))


def start(
    config: Config,
    state: TrainingState,
    ranks: Ranks,
    report: Callable[[str], None],
    *,
    data: dict[str, Any],
    given: Collection[str] = (),
) -> Progress:
    """Resume, start from given weights, or start from nothing.

    Args:
        data: fingerprint of the run's data.
        given: dotted keys that the user gave: where they differ from the checkpoint's it is a
            choice.

    Raises:
        ConfigError: no checkpoint is good, or one that was named is damaged or holds another model,
            or the data is not what the checkpoint was made with.
    """
    found = _found(config, ranks, report)
    if found is not None:
        check_changes(found, config, data, report)
        _set_later_aside(found, Path(config.run.dir) / files.CHECKPOINTS, ranks, report)
        try:
            checkpoint.load(found, state, ranks=ranks, seed=config.train.seed)
        except checkpoint.UnfitCheckpoint as error:
            raise _fault("run.resume", config.run.resume, error) from error
        report(f"resumed from {found.folder} at step {found.progress.step}")
        if config.checkpoint.load is not None:
            report("notice: checkpoint.load has no effect: the run goes on from its own checkpoint")
        progress = _counted(found, state.scheduler.num_steps, report)
        fit_schedule(state.scheduler, config, progress)
        return progress
    if config.checkpoint.load is not None:
        place = config.checkpoint.load
        if place.startswith(HF_SCHEME):
            _load_safetensors(
                Path(place.removeprefix(HF_SCHEME)), config, state, ranks, report, given
            )
            report(f"weights from {place}")
        else:
            _load_weights(place, config, state, ranks, report, given)
    return BEGINNING


def _counted(found: Found, samples: int, report: Callable[[str], None]) -> Progress:
    """Where the run stands, by the schedule's count of samples where the manifest's differs.

    Older versions took step times batch for the samples, which is wrong after a change of batch.
    """
    progress = found.progress
    if samples == progress.consumed_samples:
        return progress
    report(
        f"{found.folder} notes {progress.consumed_samples} samples, but its schedule counted"
        f" {samples}: going on at sample {samples}"
    )
    row = progress.consumed_tokens // max(progress.consumed_samples, 1)
    return replace(progress, consumed_samples=samples, consumed_tokens=samples * row, batches=())


def _found(config: Config, ranks: Ranks, report: Callable[[str], None]) -> Found | None:
    """Return the checkpoint to go on from, with the metrics file that belongs to it."""
    folder = Path(config.run.dir)
    root, resume = folder / "checkpoints", config.run.resume
    own = on_first_rank(ranks, lambda: [str(path) for path in root.glob("step_*")])
    if resume == "never":
        if any(files.PARTIAL not in name for name in own):
            advice = "use run.resume=auto or another run.dir"
            raise _fault("run.resume", resume, f"{root} holds checkpoints; {advice}")
        return None
    if resume == "auto":
        found = checkpoint.newest(root, ranks, report)
    else:
        found = _named(Path(resume), root, ranks, report)
    if found is None:
        return None
    if found.folder.parent.resolve() != root.resolve():  # its metrics are elsewhere
        return replace(found, progress=replace(found.progress, metrics_bytes=0))
    metrics = folder / "metrics.jsonl"
    present = on_first_rank(ranks, lambda: sync_file(metrics))
    if present < found.progress.metrics_bytes:
        raise _fault(
            "run.dir",
            config.run.dir,
            f"metrics.jsonl has {present} bytes, but had {found.progress.metrics_bytes} when "
            f"{found.folder.name} was saved; restore it, or use run.resume={found.folder} "
            "with another run.dir",
        )
    return found


def _named(folder: Path, root: Path, ranks: Ranks, report: Callable[[str], None]) -> Found | None:
    """Return a checkpoint that was named; its place decides what that means.

    One of this run's own: the run goes back to it. Another run's is a beginning,
    which counts only until this run has a checkpoint of its own, so that a requeued job goes on.
    """
    if folder.parent.resolve() != root.resolve():
        own = checkpoint.newest(root, ranks, report)
        if own is not None:
            return own
    try:
        return checkpoint.verified(folder, ranks)
    except checkpoint.DamagedCheckpoint as error:
        raise _fault("run.resume", str(folder), error) from error


def _set_later_aside(found: Found, root: Path, ranks: Ranks, report: Callable[[str], None]) -> None:
    """Put later checkpoints out of the way of a run that goes back to one of its own."""
    if found.folder.parent.resolve() != root.resolve():
        return

    def set_aside() -> list[str]:
        done, folders = found.progress.step, files.complete_folders(root)
        later = [path for path in folders if files.step_of(path) > done]
        return [files.set_aside(path, files.SUPERSEDED).name for path in later]

    for name in on_first_rank(ranks, set_aside):
        report(f"going back to {found.folder.name}: a later checkpoint is kept as {name}")


def _load_safetensors(
    folder: Path,
    config: Config,
    state: TrainingState,
    ranks: Ranks,
    report: Callable[[str], None],
    given: Collection[str],
) -> None:
    """Load a Hugging Face model's weights; every rank reads its own slices."""
    tp, damage = ranks.groups.tp, None
    try:
        load_hf_weights(
            folder,
            state.model.module,
            config,
            tp_rank=tp.rank(),
            tp_size=tp.size(),
            given=given,
            report=report,
        )
    except ConfigError as error:
        damage = error
    complaint = agree(ranks, damage)
    if damage is not None:
        raise damage
    if complaint is not None:
        raise _fault("checkpoint.load", f"{HF_SCHEME}{folder}", complaint)
    state.optimizer.reload_model_params()


def _load_weights(
    place: str,
    config: Config,
    state: TrainingState,
    ranks: Ranks,
    report: Callable[[str], None],
    given: Collection[str],
) -> None:
    """Weights alone, from a checkpoint with a manifest or from any Megatron checkpoint."""
    folder = Path(place)

    def known_files() -> list[bool]:
        names = (MANIFEST, "metadata.json", "config.json")
        return [(folder / name).is_file() for name in names]

    has_manifest, is_megatron, is_exported = on_first_rank(ranks, known_files)
    if is_exported and not is_megatron:
        message = f"is a Hugging Face model: write checkpoint.load={HF_SCHEME}{place}"
        raise _fault("checkpoint.load", place, message)
    if not is_megatron:
        raise _fault("checkpoint.load", place, "is not a Megatron checkpoint")
    try:
        if has_manifest:
            facts = checkpoint.verified(folder, ranks).facts
            for notice in check_start(facts, config, folder, given=given):
                report(notice)
        checkpoint.load_weights(folder, state, ranks=ranks)
    except (checkpoint.DamagedCheckpoint, checkpoint.UnfitCheckpoint) as error:
        raise _fault("checkpoint.load", place, error) from error
    unchecked = "" if has_manifest else f" (unchecked: it has no {MANIFEST})"
    report(f"weights from {place}{unchecked}")


def _fault(key: str, value: str, message: object) -> ConfigError:
    return ConfigError([Fault(key, value, str(message))])
