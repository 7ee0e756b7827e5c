"""Hugging Face folder -> Megatron distributed checkpoint, one row block at a time."""

from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, CheckpointWriter
from megatron_ttt.checkpoints.work_folder import WorkFolder, writing
from megatron_ttt.config.schema import ModelConfig, TTTConfig, TTTMode
from megatron_ttt.conversion.hf_folder import CONFIG, companions
from megatron_ttt.conversion.source import MegatronView

ORIGIN = "hf"  # folder inside the checkpoint: the source's config.json, tokenizer, generation files
IMPORTED_FROM = "imported_from"  # a fact that only imported checkpoints have
# How training lays weights out: layers under their own numbers, since fast and plain ones differ.
CONTENT = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
Report = Callable[[str, int], None]


def import_checkpoint(
    view: MegatronView,
    destination: Path,
    *,
    ttt: TTTConfig | None,
    report: Report,
    block_bytes: int = BLOCK_BYTES,
    before_publish: Callable[[Path], None] | None = None,
) -> None:
    """Write the checkpoint; a call that was killed is continued by the next one.

    Holds at most a few blocks of ``block_bytes`` (and one whole initialised ``ttt_proj``).

    Args:
        view: the source as Megatron's tensors.
        destination: folder; must not exist. Visible only when complete.
        ttt: recorded in the manifest; ``None`` without fast weights.
        report: called with (tensor, its bytes) after each.
        block_bytes: size of the row blocks that large tensors are stored in.
        before_publish: called with the finished folder before it becomes visible.

    Raises:
        ConfigError: the source is damaged, or the destination cannot be written.
    """
    facts = {
        "config": {"model": plain(view.model), "ttt": plain(ttt or TTTConfig(mode=TTTMode.off))},
        IMPORTED_FROM: str(view.folder.path.resolve()),
        "target_seed": view.seed,
    }
    job = {"facts": facts, "block_bytes": block_bytes, "files": _identity(view)}
    with writing(destination):
        folder = WorkFolder(destination, job)
        writer = CheckpointWriter(folder)
        for tensor in view.mapping.tensors:
            dtype = view.dtype(tensor)
            blocks = view.blocks(tensor, block_bytes)
            writer.add(tensor.megatron, tensor.shape, dtype, blocks)
            report(tensor.megatron, tensor.bytes(dtype))
        for file in (CONFIG, *companions(view.folder.path)):
            folder.copy(view.folder.path / file, f"{ORIGIN}/{file}")
        writer.complete(content=CONTENT, facts=facts)
        if before_publish is not None:
            before_publish(folder.path)
        folder.publish()


def plain(config: ModelConfig | TTTConfig) -> dict[str, Any]:
    """Return a configuration as JSON values, enums by name, as a run's manifest holds it."""

    def value(item: Any) -> Any:
        if isinstance(item, Enum):
            return item.name
        if isinstance(item, dict):
            return {key: value(inner) for key, inner in item.items()}
        return item

    return {key: value(item) for key, item in asdict(config).items()}


def _identity(view: MegatronView) -> dict[str, list[int]]:
    """Size and time of the source's files: a changed source is another job."""
    files = {tensor.file for tensor in view.folder.tensors.values()}
    stats = {file: (view.folder.path / file).stat() for file in sorted(files)}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
