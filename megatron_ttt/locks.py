"""One writer for what a program writes: a lock file that survives no crash of its holder.

The file names its holder: host, boot, pid, the process's start. On the same machine the holder is
looked up; a lock whose process is gone is taken over at once. From another host, or out of another
container, processes cannot be seen. There the holder's sign of life counts: the file's time, which
it renews every :data:`BEAT_S` seconds. After :data:`STALE_S` seconds without one the lock is taken
over. Times are those of the file system, never compared between the clocks of hosts.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

BEAT_S = 10.0
STALE_S = 120.0
_POLL_S = 1.0


class Occupied(Exception):
    """Another process writes there; the message is one line that names it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``machine`` is empty where the system does not tell processes apart."""

    token: str
    host: str
    machine: str
    pid: int
    started: str
    program: str

    @classmethod
    def this_process(cls) -> "Holder":
        """Under a token of its own."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            program=Path(sys.argv[0]).name,
        )

    def __str__(self) -> str:
        return f"{self.program or 'a program'} (pid {self.pid} on {self.host})"


class _Life(Enum):
    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


@dataclass
class Lock:
    """A lock that this process holds until :meth:`release`."""

    path: Path
    holder: Holder
    _made: list[Path] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def ours(self) -> bool:
        """Whether it still is: a process that was suspended for long may have been displaced."""
        try:
            found = _read(self.path)
            if found is None and not self.path.exists():  # removed by hand: nobody else has it
                _create(self.path, self.holder)
                return True
        except FileExistsError:
            return False
        except OSError:  # of a shared file system, for a while: no one can take over meanwhile
            return True
        return found is not None and found.token == self.holder.token

    def release(self) -> None:
        """Give it back; folders that were made for it go if nothing else is in them."""
        self._ended.set()
        if os.getpid() != self.holder.pid:  # a fork does not own what its parent holds
            return
        with suppress(OSError):
            found = _read(self.path)
            if found is not None and found.token == self.holder.token:
                self.path.unlink()
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            if not self.ours():
                return
            with suppress(OSError):
                os.utime(self.path)


def acquire(path: Path, report: Callable[[str], None]) -> Lock:
    """Take the lock, making the folder it lies in; waits where the holder cannot be looked up.

    Raises:
        Occupied: another living process holds it.
        OSError: the folder cannot be made or written.
    """
    made = _make_folders(path.parent)
    lock = Lock(path, Holder.this_process(), made)
    try:
        while not _try_once(lock, report):
            pass
    except BaseException:
        lock.release()
        raise
    threading.Thread(target=lock._beat, name=f"beat {path.name}", daemon=True).start()
    return lock


@contextmanager
def held(path: Path, report: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock while the context is open; raises as :func:`acquire`."""
    lock = acquire(path, report)
    try:
        yield lock
    finally:
        lock.release()


def _try_once(lock: Lock, report: Callable[[str], None]) -> bool:
    """Create the file, or judge the one that is there; False: look again."""
    with suppress(FileExistsError):
        _create(lock.path, lock.holder)
        return True
    holder, seen = _read(lock.path), _time_of(lock.path)
    if seen is None:
        return False
    life = _Life.UNKNOWN if holder is None else _life(holder)
    if life is _Life.UNKNOWN:
        life = _watch(lock.path, holder, seen, report)
    if life is _Life.ALIVE:
        raise Occupied(f"is being written by {holder}; wait, or end it first ({lock.path})")
    if life is _Life.DEAD and _take_away(lock.path, holder, seen):
        report(f"{lock.path}: {holder or 'its holder'} is gone; going on in its place")
    return False


def _watch(path: Path, holder: Holder | None, seen: float, report: Callable[[str], None]) -> _Life:
    """Wait for a sign of life until the lock is stale; UNKNOWN: the file changed hands."""
    left = STALE_S - (_file_system_time(path) - seen)
    if holder is not None and left > 0:
        report(f"{path}: waiting up to {left:.0f} s for a sign of life of {holder}")
    while (left := STALE_S - (_file_system_time(path) - seen)) > 0:
        time.sleep(min(_POLL_S, left))
        now = _read(path)
        if now != holder or (time_now := _time_of(path)) is None:
            return _Life.UNKNOWN
        if time_now != seen:
            return _Life.ALIVE
    return _Life.DEAD


def _take_away(path: Path, holder: Holder | None, seen: float) -> bool:
    """Remove a dead process's file; one of several processes that try it at once succeeds."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every shared file system has flock; then the beat finds out
            fcntl.flock(folder, fcntl.LOCK_EX)
        if _read(path) != holder or _time_of(path) != seen:
            return False
        path.unlink()
        return True
    except FileNotFoundError:
        return False
    finally:
        os.close(folder)


def _life(holder: Holder) -> _Life:
    if not holder.machine or holder.machine != _machine():
        return _Life.UNKNOWN
    return _Life.ALIVE if _start_of(holder.pid) == holder.started else _Life.DEAD


def _machine() -> str:
    """Equal for two processes that see each other: the same boot, the same process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process started, in ticks since boot; empty for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _create(path: Path, holder: Holder) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(holder)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Holder | None:
    """None: gone, or not yet written whole."""
    try:
        document: Any = json.loads(path.read_text())
        return Holder(**document)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _time_of(path: Path) -> float | None:
    """Of the last sign of life; opened, so that a shared file system asks its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _file_system_time(path: Path) -> float:
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    probe.touch(exist_ok=False)
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _make_folders(folder: Path) -> list[Path]:
    """Make what is missing; returns what was made, outermost first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
