"""What a device must do, as functions of its size: on CUDA here, small on the CPU in the suite.

``tests/gpu`` calls them with a GPU; ``tests/distributed/test_gpu_checks.py`` calls them without, so
that the first day with a device does not begin with their mistakes.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.pending import PendingScan, StreamScan
from megatron_ttt.parallel.scan import SpanExchange
from megatron_ttt.parallel.scan_algorithms.problem import Exchange
from megatron_ttt.parallel.scan_group import ScanGroup
from megatron_ttt.parallel.transport import ScanError
from megatron_ttt.parallel.watchdog import Watchdog
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder
from tests.end_to_end.lives import Run

Mail = dict[tuple[int, int], deque[tuple[Tensor, Any]]]  # (sender, receiver): tensor, event


class MailTransport:
    """Messages between pretended ranks of one process, ordered by events as streams need it."""

    def __init__(self, rank: int, mail: Mail) -> None:
        self._rank = rank
        self._mail = mail
        self.bytes_sent = self.messages_sent = 0

    def exchange(self, request: Exchange) -> None:
        for message in request.sends:
            sent = torch.cuda.Event()
            sent.record(torch.cuda.current_stream())
            self._mail[self._rank, message.peer].append((message.tensor, sent))
        for message in request.receives:
            tensor, sent = self._mail[message.peer, self._rank].popleft()
            torch.cuda.current_stream().wait_event(sent)
            message.tensor.copy_(tensor)

    def finish(self) -> None:
        """Nothing is under way."""


class PretendedGroup(ScanGroup):
    """One of several ranks that live in this process; they must be run in the scan's order."""

    def __init__(self, rank: int, ranks: int, mail: Mail) -> None:
        super().__init__(None, name="pretended", timeout_s=60.0)
        self.rank, self.ranks = rank, ranks
        self._mail = mail

    def transport(self, what: str) -> Any:
        return MailTransport(self.rank, self._mail)

    def check_equal(self, description: str, *, device: torch.device, what: str) -> None:
        """The ranks are made by the same lines."""

    def watchdog(self) -> Watchdog:
        if self._watchdog is None:
            self._watchdog = Watchdog(timeout_s=self.timeout_s, abort=lambda: None)
        return self._watchdog


def stream_scan_error(
    device: torch.device, direction: Direction, *, ranks: int, width: int, busy: int
) -> float:
    """Largest error of the carries of a scan on streams, against the recurrence in float64.

    Every summary is written late, behind ``busy`` matrix products of the caller's stream, and the
    carries are read at once: a wait that is missing on either side is an error of the size of the
    numbers themselves.
    """
    generator = torch.Generator().manual_seed(ranks)
    summaries = torch.randn(ranks, 2, width, generator=generator, dtype=torch.float64)
    keeps = torch.tensor([1.0, 0.0, 0.5])[torch.randint(3, (ranks, 2), generator=generator)]
    mail: Mail = defaultdict(deque)
    order = list(range(ranks)) if direction is Direction.FORWARD else list(range(ranks))[::-1]
    carries = {}
    for rank in order:
        exchange = SpanExchange(
            keeps,
            order=SequenceOrder.contiguous,
            group=PretendedGroup(rank, ranks, mail),
            algorithm=ScanAlgorithm.ring,
        )
        late = torch.full((1, 2, width), math.nan, device=device)
        pending: PendingScan = exchange.open(late, direction=direction)
        assert isinstance(pending, StreamScan)
        work = torch.ones(256, 256, device=device)
        for _ in range(busy):
            work = work @ work / 256
        late.copy_(summaries[rank, None].float().to(device) * work[0, 0])
        if exchange.needs_summary(direction)[0]:
            pending.provide(0, late[0])
        carries[rank] = pending.wait().clone()
    expected = torch.zeros(2, width, dtype=torch.float64)
    error = 0.0
    for rank in order:
        error = max(error, float((carries[rank][0].double().cpu() - expected).abs().max()))
        expected = keeps[rank].double()[:, None] * expected + summaries[rank]
    return error


def seconds_until_given_up(done: Callable[[], bool], *, timeout_s: float) -> float:
    """How long the watchdog watches a scan that does not finish; it must then fail everything."""
    aborted: list[float] = []
    watchdog = Watchdog(timeout_s=timeout_s, abort=lambda: aborted.append(time.monotonic()))
    began = time.monotonic()
    watchdog.watch(done, "scan ring of layer 3")
    while not aborted:
        assert time.monotonic() - began < timeout_s + 20, "nothing was given up"
        time.sleep(0.01)
    for call in (watchdog.raise_failure, lambda: watchdog.watch(done, "another")):
        try:
            call()
        except ScanError as error:
            assert str(error).startswith("scan ring of layer 3: not finished")
        else:
            raise AssertionError("a scan that was given up is not missed")
    return aborted[0] - began


def train_save_resume(run: Run) -> list[dict[str, float]]:
    """Two steps, each saved; then a third from the second's checkpoint. The rows of all three."""
    run.complete("train.steps=2", "checkpoint.interval=1")
    text = run.complete("train.steps=3", "checkpoint.interval=1")
    assert "step_00000002 at step 2" in text
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm"))
    assert all(row["grad_norm"] > 0 for row in rows)
    ratios = [row[key] for row in rows for key in row if key.startswith("ttt/update_ratio")]
    assert ratios and max(ratios) > 0, "fast weights not alive"
    return rows
