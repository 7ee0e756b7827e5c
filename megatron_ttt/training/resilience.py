"""What a run does when something from outside interferes: signals, failures of single ranks.

Preemption
    The first SIGTERM asks for a stop: every rank finishes the step, a checkpoint is saved, and the
    process ends with :data:`STOPPED`, which means "not done, start the same command again". A
    second one ends it at once. Schedulers signal a whole process group and torchrun passes the
    signal on, so that a rank hears one request several times: what follows within
    ``ECHO_SECONDS`` counts as the same request.

Failures
    :func:`on_first_rank` and :func:`agree` turn a failure on one rank into the same exception on
    every rank, so that none is left waiting for the others.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_ttt.training.distributed import Ranks

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again
ECHO_SECONDS = 5.0

Value = TypeVar("Value")


class Displaced(Exception):
    """This run showed no sign of life for long, and another one writes into its folder now."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._since: float | None = None

    def ranks_agree(self, ranks: Ranks, *, displaced: bool = False) -> bool:
        """Whether any rank was asked; every rank calls it at the same point and hears the same.

        Raises:
            Displaced: any rank says so.
        """
        asked = torch.tensor(2 * displaced or int(self._since is not None), device=ranks.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item() == 2:
            raise Displaced("another run has taken over run.dir; nothing more is written there")
        return bool(asked.item())

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > ECHO_SECONDS:
            os._exit(128 + number)


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Take SIGTERM as a request to stop while the context is open."""
    request = StopRequest()
    before = signal.signal(signal.SIGTERM, request.hear)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone while the context is open.

    cuBLAS and Transformer Engine read their part from the environment, at their first use, so
    this must be entered before the first tensor is on a GPU.
    """
    if not wanted:
        yield
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("NCCL_ALGO", "Ring")  # Megatron-core asks for a fixed one
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def on_first_rank(ranks: Ranks, action: Callable[[], Value]) -> Value:
    """Run on rank 0 and hand its value, or its exception, to every rank.

    Both must pickle.
    """
    outcome: list[Value | Exception | None] = [None, None]
    if ranks.is_first:
        try:
            outcome[0] = action()
        except Exception as error:  # raised below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=ranks.device)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def agree(ranks: Ranks, error: Exception | None) -> str | None:
    """Return the complaint of the first rank that has one, the same on every rank."""
    complaints: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(complaints, None if error is None else reason(error))
    return next((complaint for complaint in complaints if complaint is not None), None)


def reason(error: BaseException) -> str:
    """One line for a person.

    Where the system refused something, its words and the file: torch's writer stumbles over a full
    disk once more while it closes its file, and reports only that.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    return text or type(error).__name__
