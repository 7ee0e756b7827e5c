"""Checkpoint folders on disk: complete or absent. Files and checksums only, no tensors.

A checkpoint is written to a folder beside its place, synced, listed with sizes and checksums in
``manifest.json``, and made visible by one rename; ``latest`` moves last. Whatever a killed run
leaves behind is therefore no checkpoint, and is never mistaken for one.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".partial"
DAMAGED = ".damaged"
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Progress:
    """Where a run stood when the checkpoint was taken.

    Attributes:
        step: steps done.
        consumed_samples: rows of the training stream used, the data position.
        consumed_tokens: tokens of those rows.
        metrics_bytes: length of ``metrics.jsonl``.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    metrics_bytes: int


class DamagedCheckpoint(Exception):
    """A checkpoint folder is incomplete or altered; the message says which file and how."""


def step_folder(root: Path, step: int) -> Path:
    """``checkpoints/step_00000100``."""
    return root / f"step_{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where that checkpoint is written before it is visible."""
    return root / f"step_{step:08d}{PARTIAL}"


def complete_folders(root: Path) -> list[Path]:
    """Visible checkpoints, newest first."""
    return sorted(
        (path for path in root.glob("step_*") if path.name[5:].isdigit()),
        key=lambda path: int(path.name[5:]),
        reverse=True,
    )


def publish(root: Path, progress: Progress, facts: dict[str, Any]) -> Path:
    """Make a fully written partial folder visible.

    Args:
        root: the run's ``checkpoints`` folder.
        progress: of the run.
        facts: what else the manifest should hold (layout, model, versions).

    Returns:
        The visible folder.
    """
    partial, final = partial_folder(root, progress.step), step_folder(root, progress.step)
    files = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            digest = _digest(path, sync=True)
            files[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"progress": asdict(progress), "facts": facts, "files": files}
    _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
    _sync_folder(partial)
    if final.exists():  # left by a run that was cut back before it
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(root)
    beside = root / f"{LATEST}{PARTIAL}"
    _write_synced(beside, final.name + "\n")
    beside.rename(root / LATEST)
    _sync_folder(root)
    return final


def verify(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Check a folder against its manifest.

    Returns:
        Its progress and facts.

    Raises:
        DamagedCheckpoint: naming the file and what is wrong with it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        progress, facts = Progress(**manifest["progress"]), manifest["facts"]
        files = manifest["files"]
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} is unreadable ({error})") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpoint(f"{path} has {size} bytes instead of {expected['bytes']}")
        if _digest(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path} does not match its checksum")
    return progress, facts


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is kept but never loaded."""
    target = folder.with_name(folder.name + DAMAGED)
    number = 0
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{DAMAGED}.{number}")
    folder.rename(target)
    return target


def remove_surplus(root: Path, *, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete old checkpoints: all but the last ``keep_last`` and those at ``keep_every`` steps."""
    if keep_last is None:
        return []
    removed = []
    for path in complete_folders(root)[keep_last:]:
        if keep_every is not None and int(path.name[5:]) % keep_every == 0:
            continue
        hidden = path.with_name(path.name + PARTIAL)  # no half-deleted folder is ever visible
        path.rename(hidden)
        shutil.rmtree(hidden)
        removed.append(path)
    return removed


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
