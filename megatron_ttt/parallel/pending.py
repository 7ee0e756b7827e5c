"""A scan under way: driven by a thread on the CPU, by a stream of its own on CUDA.

Whoever started it goes on computing; ``wait`` gives the carries and notes for how long the wait was
exposed. Summaries may be handed in later than the start (``provide``): the program stops at the
first one it needs.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.scan_algorithms.problem import Need, Program
from megatron_ttt.parallel.spans import LocalSpans
from megatron_ttt.parallel.transport import ScanError, Transport
from megatron_ttt.parallel.watchdog import Watchdog
from megatron_ttt.scan_words import ScanAlgorithm


@dataclass
class ScanRecord:
    """Figures of one finished scan, for metrics. Holds no state."""

    algorithm: ScanAlgorithm
    direction: Direction
    blocks: int
    bytes_sent: int = 0
    messages_sent: int = 0
    _exposed_s: float = 0.0
    _exposed_events: tuple[Any, Any] | None = field(default=None, repr=False)

    @property
    def exposed_s(self) -> float:
        """Seconds that the caller (on CUDA its stream, which is synchronised here) stood still."""
        if self._exposed_events is not None:
            begin, end = self._exposed_events
            end.synchronize()
            self._exposed_s = begin.elapsed_time(end) / 1000
            self._exposed_events = None
        return self._exposed_s


Observer = Callable[[ScanRecord], None]


class PendingScan(Protocol):
    """Handle of a scan. ``record`` is complete once ``wait`` has returned."""

    record: ScanRecord

    @property
    def exposed_s(self) -> float: ...

    def provide(self, span: int, summary: Tensor) -> None:
        """Hand in the summary ``[B, ...]`` of local span ``span``.

        It is not to be written before ``wait`` has returned.
        """
        ...

    def wait(self) -> Tensor:
        """Carries ``[S, B, ...]``, in the order of local memory, of the states' dtype. Call once.

        Raises :class:`ScanError` when another rank failed, ``ValueError`` when a summary that the
        scan needs was never handed in.
        """
        ...


class _Pending:
    """What the three kinds share."""

    def __init__(self, spans: LocalSpans, record: ScanRecord, observer: Observer | None) -> None:
        self.record = record
        self._spans = spans
        self._observer = observer

    @property
    def exposed_s(self) -> float:
        return self.record.exposed_s

    def _check_complete(self) -> None:
        if self._spans.missing:
            raise ValueError(f"no summary was handed in for local span(s) {self._spans.missing}")

    def _done(self, transport: Transport | None) -> Tensor:
        if transport is not None:
            self.record.bytes_sent = transport.bytes_sent
            self.record.messages_sent = transport.messages_sent
        if self._observer is not None:
            self._observer(self.record)
        return self._spans.carries_SB


class LocalScan(_Pending):
    """One rank: nothing to send."""

    def provide(self, span: int, summary: Tensor) -> None:
        self._spans.provide(span, summary)

    def wait(self) -> Tensor:
        self._check_complete()
        self._spans.expand()
        return self._done(None)


class ThreadedScan(_Pending):
    """On the CPU: a thread runs the program, so gloo's waits and the combining overlap."""

    def __init__(
        self,
        spans: LocalSpans,
        record: ScanRecord,
        observer: Observer | None,
        *,
        program: Program,
        transport: Transport,
        timeout_s: float,
        what: str,
    ) -> None:
        super().__init__(spans, record, observer)
        self._program = program
        self._transport = transport
        self._timeout_s = timeout_s
        self._what = what
        self._handed_in = threading.Condition()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def provide(self, span: int, summary: Tensor) -> None:
        with self._handed_in:
            self._spans.provide(span, summary)
            self._handed_in.notify_all()

    def wait(self) -> Tensor:
        self._check_complete()
        began = time.perf_counter()
        self._thread.join()  # ends: every wait of the thread has a timeout
        self.record._exposed_s = time.perf_counter() - began
        if self._error is not None:
            raise self._error
        return self._done(self._transport)

    def _run(self) -> None:
        try:
            for request in self._program:
                if isinstance(request, Need):
                    self._await_summary(request.node)
                else:
                    self._transport.exchange(request)
            self._transport.finish()
            self._spans.expand()
        except Exception as error:  # raised again by wait, in the thread that can handle it
            self._error = error

    def _await_summary(self, node: int) -> None:
        with self._handed_in:
            present = self._handed_in.wait_for(
                lambda: node in self._spans.summaries, timeout=self._timeout_s
            )
        if not present:
            raise ScanError(
                f"{self._what}: this rank did not hand in its summary within {self._timeout_s:g} s"
            )


class StreamScan(_Pending):
    """On CUDA: the program is queued on ``stream``; the host never waits.

    Lifetimes: what the caller's stream allocated and ``stream`` reads or writes is recorded on it;
    messages are allocated on ``stream`` and stay there.
    """

    def __init__(
        self,
        spans: LocalSpans,
        record: ScanRecord,
        observer: Observer | None,
        *,
        program: Program,
        transport: Transport,
        stream: torch.cuda.Stream,
        watchdog: Watchdog,
        what: str,
    ) -> None:
        super().__init__(spans, record, observer)
        self._program = program
        self._transport = transport
        self._stream = stream
        self._watchdog = watchdog
        self._what = what
        self._needed: Need | None = None
        self._finished: torch.cuda.Event | None = None
        spans.carries_SB.record_stream(stream)
        self._advance()

    def provide(self, span: int, summary: Tensor) -> None:
        summary.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._spans.provide(span, summary)
        self._advance()

    def _advance(self) -> None:
        """Queue rounds until the next missing summary, or to the end."""
        if self._finished is not None:
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            while self._needed is None or self._needed.node in self._spans.summaries:
                request = next(self._program, None)
                if request is None:
                    self._transport.finish()
                    self._spans.expand()
                    self._finished = torch.cuda.Event()
                    self._finished.record(self._stream)
                    self._watchdog.watch(self._finished.query, self._what)
                    return
                self._needed = request if isinstance(request, Need) else None
                if not isinstance(request, Need):
                    self._transport.exchange(request)

    def wait(self) -> Tensor:
        self._check_complete()
        self._watchdog.raise_failure()
        assert self._finished is not None
        current = torch.cuda.current_stream()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(current)
        current.wait_event(self._finished)
        end.record(current)
        self.record._exposed_events = (begin, end)
        return self._done(self._transport)
