"""Files and folders that are complete or absent, whatever happens to the process or the machine."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, *, sync: bool = False) -> "FileRecord":
        """Read the file in pieces; ``sync``: and force it to disk."""
        digest, length = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                length += len(block)
            if sync:
                os.fsync(file.fileno())
        return cls(length, digest.hexdigest())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it is synced and takes the place of ``path``.

    Processes that replace the same file at once do not meet: the last one wins.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        sync_file(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """Write a text and force it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> int:
    """Force a file to disk; its length. A file that does not exist has length 0."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def sync_folder(path: Path) -> None:
    """Force a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def show_folder(partial: Path, final: Path) -> None:
    """Rename a fully written folder to its place, for good."""
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)
