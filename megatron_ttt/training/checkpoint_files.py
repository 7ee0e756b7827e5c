"""Checkpoint folders on disk: complete or absent. Files and checksums only, no tensors.

A checkpoint is written to a folder beside its place, synced, listed with sizes and checksums in
``manifest.json``, and made visible by one rename; ``latest`` moves last. Whatever a killed run
leaves behind is therefore no checkpoint, and is never mistaken for one.

Every rank records the files that it wrote (:func:`record_files`), so that no single rank has to
read everything; the first one gathers the records into the manifest (:func:`publish`). In the
same way every rank can check its share of a checkpoint (:func:`check_files`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ttt.training.progress import Progress

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # in a run's folder
LATEST = "latest"
PARTIAL = ".partial"
DAMAGED = ".damaged"
SUPERSEDED = ".superseded"
_RECORDS = "records_*.json"
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        progress: of the run.
        facts: what else was worth keeping: layout, configuration, versions.
        files: by path inside the folder; everything but the manifest.
    """

    progress: Progress
    facts: dict[str, Any]
    files: dict[str, FileRecord]


class DamagedCheckpoint(Exception):
    """A checkpoint folder is incomplete or altered; the message says which file and how."""


def step_folder(root: Path, step: int) -> Path:
    """``checkpoints/step_00000100``."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse, for a visible checkpoint."""
    return int(folder.name[5:])


def checkpoint_folder(path: Path) -> Path:
    """What a user means by a run's folder or its ``latest``: the newest checkpoint; else ``path``.

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
    records = {name: asdict(_record(folder / name, sync=True)) for name in names}
    _write_synced(folder / _RECORDS.replace("*", f"{writer:05d}"), json.dumps(records))


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
            records[name] = _record(path, sync=True)
    _write_manifest(partial, Manifest(progress, facts, records))
    _sync_folder(partial)
    final = step_folder(root, progress.step)
    if final.exists():
        _hide_and_remove(final)
    partial.rename(final)
    _sync_folder(root)
    beside = root / f"{LATEST}{PARTIAL}"
    _write_synced(beside, final.name + "\n")
    beside.rename(root / LATEST)
    _sync_folder(root)
    return final


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest, whose files are present in full length; contents are not read.

    Raises:
        DamagedCheckpoint: naming the file and what is wrong with it.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text())
        claimed = document.pop("sha256")
        manifest = Manifest(
            Progress.read(document["progress"]),
            dict(document["facts"]),
            {_inside(name): _file_record(**record) for name, record in document["files"].items()},
        )
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DamagedCheckpoint(f"{path} is unreadable ({reason})") from error
    if claimed != _digest_of(document):
        raise DamagedCheckpoint(f"{path} does not match its own checksum")
    for name, record in manifest.files.items():
        file = folder / name
        try:
            size = file.stat().st_size if file.is_file() else None
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise DamagedCheckpoint(f"{file} cannot be read ({error.strerror})") from error
        if size is None:
            raise DamagedCheckpoint(f"{file} is missing")
        if size != record.bytes:
            raise DamagedCheckpoint(f"{file} has {size} bytes instead of {record.bytes}")
    return manifest


def check_files(
    folder: Path, files: Mapping[str, FileRecord], *, part: int = 0, parts: int = 1
) -> None:
    """Compare contents with checksums: all files, or the ``part``-th of ``parts`` shares.

    Raises:
        DamagedCheckpoint: naming the file.
    """
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))
    for name in by_size[part::parts]:
        try:
            found = _record(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read ({error.strerror})") from error
        if found != files[name]:
            raise DamagedCheckpoint(f"{folder / name} does not match its checksum")


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


def sync_file(path: Path) -> int:
    """Force a file to disk; its length. A file that does not exist has length 0."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _hide_and_remove(folder: Path) -> None:
    """No half-deleted folder is ever visible under a checkpoint's name."""
    hidden = folder.with_name(f"{folder.name}{PARTIAL}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _inside(name: str) -> str:
    """A name of a file inside the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable():
        raise ValueError(f"{name!r} names no file inside the folder")
    return name


def _file_record(bytes: object, sha256: object) -> FileRecord:
    if type(bytes) is not int or bytes < 0 or not isinstance(sha256, str):
        raise ValueError(f"a file of {bytes!r} bytes with the checksum {sha256!r}")
    return FileRecord(bytes, sha256)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    document = asdict(manifest)
    document["sha256"] = _digest_of(document)
    _write_synced(folder / MANIFEST, json.dumps(document, indent=1))


def _digest_of(document: dict[str, Any]) -> str:
    """Of a manifest without its own checksum, however it is indented."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _record(path: Path, *, sync: bool = False) -> FileRecord:
    digest, length = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            length += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileRecord(length, digest.hexdigest())


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
