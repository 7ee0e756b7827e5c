"""Where a run begins: at its own newest checkpoint, at one that was named, or at step 0."""

from collections.abc import Callable
from pathlib import Path

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import Config
from megatron_ttt.conversion.loading import load_hf_weights
from megatron_ttt.conversion.manifest import HF_SCHEME, check_imported
from megatron_ttt.training import checkpoint
from megatron_ttt.training import checkpoint_files as files
from megatron_ttt.training.checkpoint import Found, TrainingState
from megatron_ttt.training.checkpoint_files import Progress
from megatron_ttt.training.distributed import Ranks
from megatron_ttt.training.resilience import agree, on_first_rank

BEGINNING = Progress(step=0, consumed_samples=0, consumed_tokens=0, metrics_bytes=0)


def start(
    config: Config, state: TrainingState, ranks: Ranks, report: Callable[[str], None]
) -> Progress:
    """Resume, start from given weights, or start from nothing.

    Raises:
        ConfigError: no checkpoint is good, or one that was named is damaged or holds another model.
    """
    found = _found(config, ranks, report)
    if found is not None:
        try:
            checkpoint.load(found, state, ranks=ranks, seed=config.train.seed)
        except checkpoint.UnfitCheckpoint as error:
            raise _fault("run.resume", config.run.resume, error) from error
        report(f"resumed from {found.folder} at step {found.progress.step}")
        return found.progress
    if config.checkpoint.load is not None:
        place = config.checkpoint.load
        if place.startswith(HF_SCHEME):
            _load_safetensors(Path(place.removeprefix(HF_SCHEME)), config, state, ranks)
            report(f"weights from {place}")
        else:
            _load_weights(place, config, state, ranks, report)
    return BEGINNING


def _found(config: Config, ranks: Ranks, report: Callable[[str], None]) -> Found | None:
    """The checkpoint to go on from, with the metrics file that belongs to it."""
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
        progress = Progress(**{**vars(found.progress), "metrics_bytes": 0})
        return Found(found.folder, progress, found.facts)
    metrics = folder / "metrics.jsonl"
    present = on_first_rank(ranks, lambda: files.sync_file(metrics))
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
    """A checkpoint that was named; its place decides what that means.

    One of this run's own goes back to it: later ones are set aside. Another run's is a beginning,
    which counts only until this run has a checkpoint of its own, so that a requeued job goes on.
    """
    if folder.parent.resolve() != root.resolve():
        own = checkpoint.newest(root, ranks, report)
        if own is not None:
            return own
    try:
        found = checkpoint.verified(folder, ranks)
    except checkpoint.DamagedCheckpoint as error:
        raise _fault("run.resume", str(folder), error) from error

    def set_later_aside() -> list[str]:
        later = [path for path in files.complete_folders(root) if path.name > folder.name]
        return [files.set_aside(path, files.SUPERSEDED).name for path in later]

    if folder.parent.resolve() == root.resolve():
        for name in on_first_rank(ranks, set_later_aside):
            report(f"going back to {folder.name}: a later checkpoint is kept as {name}")
    return found


def _load_safetensors(folder: Path, config: Config, state: TrainingState, ranks: Ranks) -> None:
    """A Hugging Face model's weights; every rank reads its own slices."""
    tp, damage = ranks.groups.tp, None
    try:
        load_hf_weights(folder, state.model.module, config, tp_rank=tp.rank(), tp_size=tp.size())
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
) -> None:
    """Weights alone, from a checkpoint with a manifest or from any Megatron checkpoint."""
    folder = Path(place)

    def known_files() -> list[bool]:
        return [(folder / name).is_file() for name in (files.MANIFEST, "metadata.json")]

    has_manifest, is_megatron = on_first_rank(ranks, known_files)
    if not is_megatron:
        raise _fault("checkpoint.load", place, "is no folder with a Megatron checkpoint")
    try:
        if has_manifest:
            check_imported(checkpoint.verified(folder, ranks).facts, config.model, folder)
        checkpoint.load_weights(folder, state, ranks=ranks)
    except (checkpoint.DamagedCheckpoint, checkpoint.UnfitCheckpoint) as error:
        raise _fault("checkpoint.load", place, error) from error
    unchecked = "" if has_manifest else f" (unchecked: it has no {files.MANIFEST})"
    report(f"weights from {place}{unchecked}")


def _fault(key: str, value: str, message: object) -> ConfigError:
    return ConfigError([Fault(key, value, str(message))])
