"""``manifest.json``: what a checkpoint says of itself, and which files belong to it.

Trained and imported checkpoints have the same one. It carries a checksum of its own; ranks can
check their shares of the files (:func:`check_files`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.files import FileRecord
from megatron_ttt.rule import in_todays_words

MANIFEST = "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint folder is incomplete or altered; the message says which file and how."""


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

    def text(self) -> str:
        """Return the file's content."""
        document = asdict(self)
        document["sha256"] = _digest_of(document)
        return json.dumps(document, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest, whose files are present in full length; contents are not read.

    Raises:
        DamagedCheckpoint: naming the file and what is wrong with it.
    """
    manifest = parse_manifest(folder)
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


def parse_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest alone, whatever has become of the files that it lists.

    Raises:
        DamagedCheckpoint: it is missing, altered or not one of this kind.
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
    config = manifest.facts.get("config")
    if isinstance(config, dict):
        manifest.facts["config"] = in_todays_words(config)
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
            found = FileRecord.of(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read ({error.strerror})") from error
        if found != files[name]:
            raise DamagedCheckpoint(f"{folder / name} does not match its checksum")


def _inside(name: str) -> str:
    """Return a name of a file inside the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable():
        raise ValueError(f"{name!r} names no file inside the folder")
    return name


def _file_record(bytes: object, sha256: object) -> FileRecord:
    if type(bytes) is not int or bytes < 0 or not isinstance(sha256, str):
        raise ValueError(f"a file of {bytes!r} bytes with the checksum {sha256!r}")
    return FileRecord(bytes, sha256)


def _digest_of(document: dict[str, Any]) -> str:
    """Of a manifest without its own checksum, however it is indented."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
