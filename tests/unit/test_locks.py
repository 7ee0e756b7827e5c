"""One holder at a time: crashes leave nothing that has to be cleared away by hand."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ttt import locks
from megatron_ttt.locks import Holder, Occupied, acquire, held

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "writer.lock"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours become seconds."""
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "STALE_S", 1.5)
    monkeypatch.setattr(locks, "_POLL_S", 0.05)


def leave(path: Path, holder: Holder, *, age: float = 0.0) -> None:
    """A lock file as that process left it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))


def elsewhere() -> Holder:
    """A process that cannot be looked up from here."""
    return replace(Holder.this_process(), host="node7", machine="node7 other-boot pid:[1]")


def silent(line: str) -> None:
    pass


def test_the_second_is_told_who_the_first_is(path: Path) -> None:
    with held(path, silent), pytest.raises(Occupied) as caught:
        acquire(path, silent)
    assert f"(pid {os.getpid()} on {locks.socket.gethostname()})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.parent.exists(), "what was made for the lock goes with it"
    with held(path, silent):
        (path.parent / "result").touch()
    assert [file.name for file in path.parent.iterdir()] == ["result"]


def hold_and_sleep(path: Path, ready: Callable[[], None]) -> None:
    with held(path, silent):
        ready()
        time.sleep(60)


@pytest.mark.parametrize("reaped", [True, False])
def test_kill_9_leaves_nothing_to_wait_for(path: Path, reaped: bool) -> None:
    """Also while the dead process is a zombie, which torchrun has not waited for yet."""
    ready = FORK.Event()
    child = FORK.Process(target=hold_and_sleep, args=(path, ready.set))
    child.start()
    assert ready.wait(20) and child.pid is not None
    with pytest.raises(Occupied):
        acquire(path, silent)
    os.kill(child.pid, signal.SIGKILL)
    if reaped:
        child.join()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    said: list[str] = []
    with held(path, said.append):
        assert len(said) == 1 and f"pid {child.pid}" in said[0] and "is gone" in said[0]
    child.join()


def test_a_pid_that_was_given_again_is_another_process(path: Path) -> None:
    leave(path, replace(Holder.this_process(), started="1"))
    with held(path, silent) as lock:
        assert lock.ours()


def test_another_host_that_gives_signs_of_life(path: Path, quick: None) -> None:
    leave(path, elsewhere())
    threading.Timer(0.4, os.utime, [path]).start()
    said: list[str] = []
    with pytest.raises(Occupied, match="on node7"):
        acquire(path, said.append)
    assert len(said) == 1 and "waiting up to" in said[0]


def test_another_host_that_gives_none(path: Path, quick: None) -> None:
    leave(path, elsewhere())
    began = time.monotonic()
    with held(path, silent):
        assert time.monotonic() - began > 1.2
    leave(path, elsewhere(), age=3)
    began = time.monotonic()
    with held(path, silent):
        assert time.monotonic() - began < 1.0, "it was stale already"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0"])
def test_a_file_that_says_nothing_counts_by_its_age(path: Path, quick: None, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    os.utime(path, (1e9, 1e9))
    with held(path, silent) as lock:
        assert lock.ours()


def take_when_told(path: Path, start: object, held_by: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    try:
        acquire(path, silent)
    except Occupied:
        return
    held_by.put(os.getpid())  # type: ignore[attr-defined]
    time.sleep(3)


def test_of_many_that_find_a_stale_lock_one_gets_it(path: Path) -> None:
    leave(path, replace(Holder.this_process(), started="1"))
    start, winners = FORK.Barrier(6), FORK.Queue()
    children = [FORK.Process(target=take_when_told, args=(path, start, winners)) for _ in range(6)]
    for child in children:
        child.start()
    first = winners.get(timeout=20)
    for child in children:
        child.join()
    assert winners.empty() and first in [child.pid for child in children]


def test_who_was_displaced_knows_and_disturbs_nobody(path: Path, quick: None) -> None:
    lock = acquire(path, silent)
    before = path.stat().st_mtime
    time.sleep(0.3)
    assert path.stat().st_mtime > before and lock.ours(), "no sign of life"
    leave(path, elsewhere(), age=50)
    assert not lock.ours()
    time.sleep(0.3)
    assert time.time() - path.stat().st_mtime > 40, "another's lock was renewed"
    lock.release()
    assert path.exists()


def test_a_lock_that_was_removed_by_hand_is_made_again(path: Path) -> None:
    with held(path, silent) as lock:
        path.unlink()
        assert lock.ours()
        with pytest.raises(Occupied):
            acquire(path, silent)


def test_a_fork_does_not_give_back_what_its_parent_holds(path: Path) -> None:
    with held(path, silent) as lock:
        child = FORK.Process(target=lock.release)
        child.start()
        child.join()
        assert path.exists()
