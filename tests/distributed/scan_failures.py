"""Ranks that die, are late or disagree in the middle of a scan: what the others are told."""

import os
import time

import torch
import torch.distributed as dist

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.layout import spans_per_rank, total_spans
from megatron_ttt.parallel.scan import ScanGroup, SpanExchange
from megatron_ttt.parallel.scan_algorithms.problem import Exchange
from megatron_ttt.parallel.transport import Transport
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

TIMEOUT_S = 2.0
ORDER = SequenceOrder.zigzag


class Faulty:
    """Dies, or sleeps, at the last of ``rounds`` exchanges of a scan."""

    def __init__(self, inner: Transport, *, rounds: int, sleep_s: float | None) -> None:
        self._inner = inner
        self._rounds = rounds
        self._sleep_s = sleep_s

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def messages_sent(self) -> int:
        return self._inner.messages_sent

    def exchange(self, request: Exchange) -> None:
        self._rounds -= 1
        if self._rounds == 0 and self._sleep_s is None:
            os._exit(9)
        if self._rounds == 0 and self._sleep_s is not None:
            time.sleep(self._sleep_s)
        self._inner.exchange(request)

    def finish(self) -> None:
        self._inner.finish()


def scan_beside_a_fault(
    rank: int, ranks: int, algorithm: ScanAlgorithm, faulty: int, sleep_s: float | None
) -> tuple[str, float]:
    """The error that this rank is given (empty: none) and after how many seconds.

    The first scan succeeds; in the second, rank ``faulty`` dies (``sleep_s`` None) or sleeps.
    """
    process_group = dist.new_group(list(range(ranks)))
    # After the first round of doubling not every rank depends on the faulty one any more.
    rounds = 1 if algorithm in (ScanAlgorithm.all_gather, ScanAlgorithm.doubling) else 2

    def spoil(transport: Transport) -> Transport:
        return Faulty(transport, rounds=rounds, sleep_s=sleep_s)

    keeps = torch.ones(total_spans(ranks, ORDER), 1)
    states = torch.ones(spans_per_rank(ORDER), 1, 3001)
    healthy = ScanGroup(process_group, name="cp", timeout_s=TIMEOUT_S)
    SpanExchange(keeps, order=ORDER, group=healthy, algorithm=algorithm).start(
        states, direction=Direction.FORWARD
    ).wait()
    group = ScanGroup(
        process_group,
        name="cp",
        timeout_s=TIMEOUT_S,
        wrap_transport=spoil if rank == faulty else None,
    )
    exchange = SpanExchange(keeps, order=ORDER, group=group, algorithm=algorithm, label="layer 6")
    began = time.monotonic()
    try:
        pending = exchange.start(states, direction=Direction.REVERSE)
        pending.wait()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "", time.monotonic() - began


def scan_differing(
    rank: int, ranks: int, algorithms: list[ScanAlgorithm], shapes: list[int]
) -> None:
    """Each rank comes with its own algorithm and state size, and its own dtype at size 0."""
    width = shapes[rank] or 7
    dtype = torch.float32 if shapes[rank] else torch.bfloat16
    exchange = SpanExchange(
        torch.ones(ranks, 2),
        order=SequenceOrder.contiguous,
        group=dist.group.WORLD,
        algorithm=algorithms[rank],
    )
    exchange.start(torch.zeros(1, 2, width, dtype=dtype), direction=Direction.FORWARD).wait()


def scan_unlike(rank: int, ranks: int) -> str:
    """Rank 0 scans another shape than the rest, later than the first time."""
    process_group = dist.new_group(list(range(ranks)))
    group = ScanGroup(process_group, name="cp", timeout_s=1.0)
    exchange = SpanExchange(
        torch.ones(ranks, 1),
        order=SequenceOrder.contiguous,
        group=group,
        algorithm=ScanAlgorithm.ring,
    )
    exchange.start(torch.ones(1, 1, 8), direction=Direction.FORWARD).wait()
    try:
        width = 4 if rank == 0 else 8
        exchange.start(torch.ones(1, 1, width), direction=Direction.FORWARD).wait()
    except RuntimeError as error:
        return str(error)
    return ""
