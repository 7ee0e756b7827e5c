"""The scan without a process group: one rank, refusals; the watchdog with a pretended device."""

import threading
import time

import pytest
import torch

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.scan import SpanExchange
from megatron_ttt.parallel.transport import ScanError
from megatron_ttt.parallel.watchdog import Watchdog
from megatron_ttt.scan_words import SequenceOrder

ZIGZAG, CONTIGUOUS = SequenceOrder.zigzag, SequenceOrder.contiguous


def test_two_spans_of_a_single_rank() -> None:
    states = torch.tensor([[[2.0, 3.0], [5.0, 7.0]], [[1.0, 1.0], [1.0, 1.0]]])
    exchange = SpanExchange(torch.tensor([[0.5, 0.0], [1.0, 1.0]]), order=ZIGZAG)
    carries = exchange.start(states, direction=Direction.FORWARD).wait()
    assert carries.tolist() == [[[0, 0], [0, 0]], [[2, 3], [5, 7]]]
    upstream = torch.tensor([[[8.0, 8.0], [8.0, 8.0]], [[4.0, 6.0], [10.0, 12.0]]])
    gradient = exchange.start(upstream, direction=Direction.REVERSE).wait()
    assert gradient.tolist() == [[[4, 6], [10, 12]], [[0, 0], [0, 0]]]


def test_the_reverse_of_a_single_rank_and_its_handle() -> None:
    states = torch.arange(8.0).view(2, 2, 2)
    exchange = SpanExchange(torch.ones(2, 2), order=ZIGZAG)
    handle = exchange.start(states, direction=Direction.REVERSE)
    assert handle.wait().tolist() == [[[4, 5], [6, 7]], [[0, 0], [0, 0]]]
    assert handle.exposed_s == 0.0 and handle.record.bytes_sent == 0


def test_records_reach_the_observer() -> None:
    seen = []
    exchange = SpanExchange(torch.ones(2, 1), order=ZIGZAG, observer=seen.append)
    other = exchange.for_layer("layer 6")
    for direction in Direction:
        other.start(torch.ones(2, 1, 3), direction=direction).wait()
    assert [record.direction for record in seen] == list(Direction)
    assert (exchange.label, other.label) == ("", "layer 6")


def test_the_last_summary_is_not_needed() -> None:
    exchange = SpanExchange(torch.ones(2, 1), order=ZIGZAG)
    assert exchange.needs_summary(Direction.FORWARD) == [True, False]
    assert exchange.needs_summary(Direction.REVERSE) == [False, True]
    pending = exchange.open(torch.empty(2, 1, 3), direction=Direction.FORWARD)
    with pytest.raises(ValueError, match=r"local span\(s\) \[0\]"):
        pending.wait()


@pytest.mark.parametrize("keep", [1.5, -0.1, float("nan")])
def test_keeps_outside_the_unit_interval_are_refused(keep: float) -> None:
    keeps = torch.ones(2, 3)
    keeps[1, 2] = keep
    with pytest.raises(
        ValueError, match=rf"keep {keep:.1f}\d* of span 1, row 2 is outside \[0, 1\]"
    ):
        SpanExchange(keeps, order=ZIGZAG)


@pytest.mark.parametrize(
    ("order", "keeps", "states", "fault"),
    [
        (ZIGZAG, (3, 2), (2, 2, 4), r"keeps \[3, 2\] are not \[2, batch rows\]"),
        (ZIGZAG, (2, 2), (1, 2, 4), r"states \[1, 2, 4\] are not \[2, 2, ...\]"),
        (CONTIGUOUS, (1, 2), (1, 3, 4), r"states \[1, 3, 4\] are not \[1, 2, ...\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    order: SequenceOrder, keeps: tuple[int, ...], states: tuple[int, ...], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        exchange = SpanExchange(torch.ones(keeps), order=order)
        exchange.start(torch.ones(states), direction=Direction.FORWARD)


def test_states_of_integers_are_refused() -> None:
    exchange = SpanExchange(torch.ones(1, 2), order=CONTIGUOUS)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        exchange.start(torch.ones(1, 2, 4).long(), direction=Direction.FORWARD)


def test_the_watchdog_gives_up_and_frees_the_device() -> None:
    aborted = threading.Event()
    watchdog = Watchdog(timeout_s=0.2, abort=aborted.set)
    watchdog.watch(lambda: True, "a scan that ends")
    watchdog.watch(aborted.is_set, "scan ring of layer 6 over the cp group")
    assert aborted.wait(timeout=10)
    with pytest.raises(ScanError, match=r"scan ring of layer 6 .* not finished 0.2 s"):
        watchdog.raise_failure()
    with pytest.raises(ScanError):
        watchdog.watch(lambda: True, "another")


def test_the_watchdog_lets_finished_scans_be() -> None:
    aborted: list[str] = []  # the watchdog aborts in a thread of its own, where no assertion counts
    watchdog = Watchdog(timeout_s=0.3, abort=lambda: aborted.append("a scan"))
    ready = time.monotonic() + 0.1
    watchdog.watch(lambda: time.monotonic() > ready, "a scan")
    time.sleep(0.5)
    watchdog.raise_failure()
    assert aborted == []
