"""Persistent gloo ranks for tests: starting costs seconds, a message to a waiting rank costs 5 ms.

``RankPool.run(function, *args, ranks=4)`` calls ``function(rank, ranks, *args)`` in ``ranks``
waiting processes whose ``torch.distributed`` is initialised (gloo, world size ``ranks``) and
returns the values in rank order. ``function`` must be importable: a module-level function.
"""

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120.0  # a loaded machine imports torch slowly
JOIN_SECONDS = 20.0  # the ranks of one world size find each other
GRACE_SECONDS = 2.0  # after the first failure the other ranks may still report theirs
# A run of Megatron leaves its process groups behind, two threads each: its DDP and the autograd
# nodes it hooks hold each other through C++, where Python's collector cannot see it.
MOST_THREADS = 500


class RankDied(RuntimeError):
    """A rank ended without reporting: ``os._exit``, a signal, a crash."""


class RankTimeout(TimeoutError):
    """A rank did not report in time; the message holds the stack of every late rank."""


class Status(Enum):
    RETURNED = "returned"
    RAISED = "raised"
    DIED = "died"
    LATE = "late"


@dataclass
class Outcome:
    """What became of one rank: its value, or the error that stands for its failure."""

    status: Status
    value: Any = None
    error: BaseException | None = None


@dataclass
class _Job:
    """One message to a rank. ``join`` is set when the process group must be made anew."""

    ranks: int
    rank: int
    python_path: list[str]
    join: Path | None = None
    call: bytes | None = None
    stack_file: Path | None = None
    stack_after: float = 0.0


class RankPool:
    """Up to ``limit`` spawned processes; each :meth:`run` takes the first ``ranks`` of them."""

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []
        self._joined = 0  # world size of the present process group, 0: none
        self._joins = 0
        self._folder = Path(tempfile.mkdtemp(prefix="rank_pool_"))

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int = 4, timeout: float = 60.0
    ) -> list[Any]:
        """Values of ``function(rank, ranks, *args)`` in rank order.

        Raises a failing rank's own exception (its traceback is a note of the exception),
        :class:`RankDied`, or :class:`RankTimeout`. The pool is usable again afterwards.
        """
        outcomes = self._outcomes(function, args, ranks, timeout, grace=GRACE_SECONDS)
        failures = [outcome for outcome in outcomes if outcome.error is not None]
        for status in (Status.DIED, Status.RAISED, Status.LATE):
            for outcome in failures:
                if outcome.status is status:
                    assert outcome.error is not None
                    raise outcome.error
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, ranks: int = 4, timeout: float = 60.0
    ) -> list[Outcome]:
        """Like :meth:`run`, but failures are returned: for tests whose ranks are meant to fail."""
        return self._outcomes(function, args, ranks, timeout, grace=timeout)

    def close(self) -> None:
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _outcomes(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        ranks: int,
        timeout: float,
        grace: float,
    ) -> list[Outcome]:
        if not 1 <= ranks <= self._limit:
            raise ValueError(f"ranks = {ranks}: the pool has 1 to {self._limit}")
        self._prepare(ranks)
        call = pickle.dumps((function, args))
        stacks = [self._folder / f"stack_{rank}" for rank in range(ranks)]
        for rank, member in enumerate(self._members[:ranks]):
            job = _Job(ranks, rank, sys.path, call=call)
            job.stack_file, job.stack_after = stacks[rank], 0.9 * timeout
            member.send(job)
        outcomes = _collect(self._members[:ranks], timeout, grace)
        _attach_stacks(outcomes, stacks)
        if any(outcome.status in (Status.DIED, Status.LATE) for outcome in outcomes):
            self._kill()
        elif any(outcome.status is Status.RAISED for outcome in outcomes):
            self._joined = 0  # messages may be left in the old group
        if any(member.threads > MOST_THREADS for member in self._members):
            self._kill()
        return outcomes

    def _prepare(self, ranks: int) -> None:
        """Start missing ranks and make the process group; with fresh ranks if the old ones fail."""
        if self._joined == ranks:
            return
        for _attempt in ("reuse", "fresh"):
            while len(self._members) < ranks:
                self._members.append(_Member(self._context))
            self._joins += 1
            store = self._folder / f"store_{self._joins}"
            for rank, member in enumerate(self._members[:ranks]):
                member.send(_Job(ranks, rank, sys.path, join=store))
            started = all(member.ready for member in self._members[:ranks])
            patience = JOIN_SECONDS if started else START_SECONDS
            outcomes = _collect(self._members[:ranks], patience, grace=GRACE_SECONDS)
            if all(outcome.status is Status.RETURNED for outcome in outcomes):
                self._joined = ranks
                for member in self._members[:ranks]:
                    member.ready = True
                return
            self._kill()
        raise RuntimeError(f"{ranks} ranks could not be joined: {outcomes}")

    def _kill(self) -> None:
        for member in self._members:
            member.kill()
        self._members = []
        self._joined = 0


@dataclass
class _Member:
    """One process and the pipe to it."""

    context: Any
    ready: bool = False
    process: Any = field(init=False)
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.connection, remote = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(remote,), daemon=True)
        self.process.start()
        remote.close()

    @property
    def threads(self) -> int:
        """Threads of the process; 0 where the system does not tell or it has ended."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else 0

    def send(self, job: _Job) -> None:
        try:
            self.connection.send(job)
        except (BrokenPipeError, ConnectionResetError):
            return  # the process is dead; collecting reports it

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _collect(members: Sequence[_Member], timeout: float, grace: float) -> list[Outcome]:
    """Wait for every member's report; ``grace`` seconds at most after the first failure."""
    deadline = time.monotonic() + timeout
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(members):
        waiting = {m.connection: rank for rank, m in enumerate(members) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]  # type: ignore[index]
            outcomes[rank] = _receive(members[rank], rank, len(members))
            if outcomes[rank].status is not Status.RETURNED:
                deadline = min(deadline, time.monotonic() + grace)
    late = RankTimeout(f"no report within {timeout:g} s from rank(s) ")
    late.args = (late.args[0] + str([r for r in range(len(members)) if r not in outcomes]),)
    return [outcomes.get(r, Outcome(Status.LATE, error=late)) for r in range(len(members))]


def _receive(member: _Member, rank: int, ranks: int) -> Outcome:
    try:
        status, value, text = pickle.loads(member.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        member.process.join(timeout=GRACE_SECONDS)
        code = member.process.exitcode
        return Outcome(
            Status.DIED, error=RankDied(f"rank {rank} of {ranks} died, exit code {code}")
        )
    if status is Status.RETURNED:
        return Outcome(status, value=value)
    value.add_note(f"rank {rank} of {ranks}:\n{text}")
    return Outcome(status, error=value)


def _attach_stacks(outcomes: Sequence[Outcome], stacks: Sequence[Path]) -> None:
    for rank, (outcome, stack) in enumerate(zip(outcomes, stacks, strict=True)):
        if outcome.status is Status.LATE and stack.exists():
            assert outcome.error is not None
            outcome.error.add_note(f"rank {rank}, late:\n{stack.read_text()}")
        stack.unlink(missing_ok=True)


def _serve(connection: Connection) -> None:
    """The life of a rank: jobs in, reports out, until the pipe closes."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send_bytes(_report(job))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(job: _Job) -> bytes:
    try:
        if job.join is not None:
            return pickle.dumps((Status.RETURNED, _join(job), ""))
        return pickle.dumps((Status.RETURNED, _call(job), ""))
    except Exception as error:
        text = traceback.format_exc()
        try:
            report = pickle.dumps((Status.RAISED, error, text))
            pickle.loads(report)  # some exceptions pickle but do not come back
        except Exception:
            stand_in = RuntimeError(f"{type(error).__name__}: {error}")
            return pickle.dumps((Status.RAISED, stand_in, text))
        return report


def _join(job: _Job) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.join}",
        rank=job.rank,
        world_size=job.ranks,
        timeout=timedelta(seconds=60),
    )


def _call(job: _Job) -> Any:
    sys.path[:] = job.python_path
    assert job.call is not None and job.stack_file is not None
    with job.stack_file.open("w") as stack:
        faulthandler.dump_traceback_later(job.stack_after, file=stack)
        try:
            function, args = pickle.loads(job.call)
            return function(job.rank, job.ranks, *args)
        finally:
            faulthandler.cancel_dump_traceback_later()
