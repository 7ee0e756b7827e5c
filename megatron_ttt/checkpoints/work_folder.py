"""Output folders: complete or absent, and a killed conversion continues where it stopped.

Everything is written into ``NAME.partial`` beside the destination. ``journal.jsonl`` in there
lists each finished file with its size and checksum; at the end the folder is renamed. The journal
begins with a description of the job, and a partial folder of another job is not continued.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.files import FileRecord, show_folder
from megatron_ttt.locks import Occupied, held

PARTIAL = ".partial"
JOURNAL = "journal.jsonl"


class WorkFolder:
    """A destination that is being written.

    Attributes:
        final: the destination.
        path: the partial folder beside it.
        done: finished files by name, with ``bytes``, ``sha256`` and what was noted about them.
    """

    def __init__(self, final: Path, job: dict[str, Any]) -> None:
        """Start, or continue the same job.

        Args:
            final: must not exist, or be an empty folder.
            job: whatever decides the content; JSON values.

        Raises:
            ConfigError: the destination exists, or cannot be written.
        """
        self.final = final
        self.path = final.with_name(final.name + PARTIAL)
        self.done: dict[str, dict[str, Any]] = {}
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise ConfigError([Fault("output", final, "exists and is not empty")])
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        with _in_words(self.path):
            if not self._continue(digest):
                if self.path.exists():
                    shutil.rmtree(self.path)
                self.path.mkdir(parents=True)
                self._note({"job": digest})

    def finish(self, name: str, **notes: Any) -> None:
        """Record a file as complete: synced, measured, checksummed."""
        record = FileRecord.of(self.path / name, sync=True)
        entry = {"file": name, **asdict(record), **notes}
        self._note(entry)
        self.done[name] = entry

    def write_text(self, name: str, text: str) -> None:
        """Write a small file, complete at once."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)
        self.finish(name)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file from elsewhere."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, self.path / name)
        self.finish(name)

    def publish(self) -> None:
        """Make the destination visible."""
        (self.path / JOURNAL).unlink()
        if self.final.exists():
            self.final.rmdir()
        show_folder(self.path, self.final)

    def _continue(self, digest: str) -> bool:
        try:
            lines = (self.path / JOURNAL).read_text().splitlines()
        except FileNotFoundError:
            return False
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # the line at which the process was killed
                break
        if not entries or entries[0].get("job") != digest:
            return False
        for entry in entries[1:]:
            path = self.path / entry["file"]
            if path.is_file() and path.stat().st_size == entry["bytes"]:
                self.done[entry["file"]] = entry
        (self.path / JOURNAL).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return True

    def _note(self, entry: dict[str, Any]) -> None:
        with (self.path / JOURNAL).open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Be the only process that writes a destination, and turn refusals into one line for the user.

    Raises:
        ConfigError: another process writes it, or the system refuses (full disk, read-only folder).
    """
    lock = final.with_name(f"{final.name}.lock")
    try:
        with _in_words(final), held(lock, lambda line: print(line, file=sys.stderr)):
            yield
    except Occupied as error:
        raise ConfigError([Fault("output", final, str(error))]) from error


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise ConfigError([Fault("output", path, message)]) from error
