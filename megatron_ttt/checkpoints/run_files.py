"""Checkpoint folders on disk: complete or absent. Files and checksums only, no tensors.

A checkpoint is written to a folder beside its place, synced, listed with sizes and checksums in
``manifest.json``, and made visible by one rename; ``latest`` moves last. Whatever a killed run
leaves behind is therefore no checkpoint, and is never mistaken for one.

Every rank records the files that it wrote (:func:`record_files`), so that no single rank has to
read everything; the first one gathers the records into the manifest (:func:`publish`).
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ttt.checkpoints.manifest import MANIFEST, Manifest
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.files import FileRecord, replacing, show_folder, sync_folder, write_synced

CHECKPOINTS = "checkpoints"  # in a run's folder
LATEST = "latest"
PARTIAL = ".partial"
DAMAGED = ".damaged"
SUPERSEDED = ".superseded"
_RECORDS = "records_*.json"


def step_folder(root: Path, step: int) -> Path:
    """``checkpoints/step_00000100``."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the inverse, for a visible checkpoint."""
    return int(folder.name[5:])


def checkpoint_folder(path: Path) -> Path:
    """Return the newest checkpoint of a run's folder or its ``latest``; else ``path``.

    A name that ``latest`` holds is not checked: whoever opens the folder says what is wrong.
    """
    if (path / CHECKPOINTS / LATEST).is_file():
        path = path / CHECKPOINTS / LATEST
    if path.name == LATEST and path.is_file():
        path = path.parent / path.read_text(encoding="utf-8").strip()
    return path


def partial_folder(root: Path, step: int, token: str) -> Path:
    """Where that checkpoint is written before it is visible.

    ``token`` differs at every attempt: what is left of a killed run, perhaps still being written
    by a process that outlived it, never mixes with the next attempt.
    """
    return root / f"step_{step:08d}{PARTIAL}.{token}"


def complete_folders(root: Path) -> list[Path]:
    """Visible checkpoints, newest first."""
    return sorted(
        (path for path in root.glob("step_*") if path.name[5:].isdigit()),
        key=step_of,
        reverse=True,
    )


def remove_leftovers(root: Path) -> None:
    """Delete what killed runs left half written."""
    for path in root.glob(f"step_*{PARTIAL}*"):
        shutil.rmtree(path)


def record_files(folder: Path, names: Iterable[str], *, writer: int) -> None:
    """Sync the named files of ``folder`` and note their sizes and checksums for :func:`publish`.

    Args:
        folder: the partial folder.
        names: paths inside it.
        writer: a number of its own for everyone who records files (the rank).
    """
    records = {name: asdict(FileRecord.of(folder / name, sync=True)) for name in names}
    write_synced(folder / _RECORDS.replace("*", f"{writer:05d}"), json.dumps(records))


def publish(root: Path, partial: Path, progress: Progress, facts: dict[str, Any]) -> Path:
    """Make a fully written partial folder visible.

    Args:
        root: the run's ``checkpoints`` folder.
        partial: the folder; files that nobody has recorded yet are recorded here.
        progress: of the run.
        facts: what else the manifest should hold.

    Returns:
        The visible folder.
    """
    records: dict[str, FileRecord] = {}
    for path in sorted(partial.glob(_RECORDS)):
        for name, record in json.loads(path.read_text()).items():
            records[name] = FileRecord(**record)
        path.unlink()
    for path in sorted(partial.rglob("*")):
        name = str(path.relative_to(partial))
        if path.is_file() and name not in records:
            records[name] = FileRecord.of(path, sync=True)
    write_synced(partial / MANIFEST, Manifest(progress, facts, records).text())
    final = step_folder(root, progress.step)
    if final.exists():
        _hide_and_remove(final)
    show_folder(partial, final)
    with replacing(root / LATEST) as beside:
        beside.write_text(final.name + "\n")
    sync_folder(root)
    return final


def set_aside(folder: Path, mark: str = DAMAGED) -> Path:
    """Rename a checkpoint so that it is kept but never loaded."""
    target = folder.with_name(folder.name + mark)
    number = 0
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{mark}.{number}")
    folder.rename(target)
    return target


def remove_surplus(root: Path, *, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete old checkpoints: all but the last ``keep_last`` and those at ``keep_every`` steps."""
    if keep_last is None:
        return []
    removed = []
    for path in complete_folders(root)[keep_last:]:
        if keep_every is not None and step_of(path) % keep_every == 0:
            continue
        _hide_and_remove(path)
        removed.append(path)
    return removed


def _hide_and_remove(folder: Path) -> None:
    """No half-deleted folder is ever visible under a checkpoint's name."""
    hidden = folder.with_name(f"{folder.name}{PARTIAL}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)
