"""Behind independent work a scan's slow links are not waited for; and the benchmark runs."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ttt.benchmarks.delayed_transport import DelayedTransport
from megatron_ttt.benchmarks.scan import Report, ScanProblem, measure
from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.cost import load_topology, save_topology
from megatron_ttt.parallel.layout import spans_per_rank, total_spans
from megatron_ttt.parallel.scan import ScanGroup, SpanExchange
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.parallel.transport import Transport
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder
from tests.pool import RankPool

ORDER = SequenceOrder.zigzag
DELAY_S = 0.1


def slow_links(transport: Transport) -> Transport:
    return DelayedTransport(transport, alpha_s=DELAY_S, beta_s_per_byte=0.0)


def exposed_waits(rank: int, ranks: int, algorithm: ScanAlgorithm) -> tuple[float, float]:
    """Seconds exposed when awaited at once, and behind as much work.

    The work sleeps: it stands for a device's, which does not share this machine's two cores.
    """
    group = ScanGroup(dist.group.WORLD, wrap_transport=slow_links)
    keeps = torch.ones(total_spans(ranks, ORDER), 1)
    exchange = SpanExchange(keeps, order=ORDER, group=group, algorithm=algorithm)
    states = torch.ones(spans_per_rank(ORDER), 1, 100)
    exposed = []
    work_s = 0.0
    for _ in range(2):
        dist.barrier()
        pending = exchange.start(states, direction=Direction.FORWARD)
        time.sleep(work_s)
        pending.wait()
        exposed.append(pending.exposed_s)
        slowest = torch.tensor(exposed[0])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        work_s = float(slowest)
    return exposed[0], exposed[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_overlap_hides_slow_links(pool: RankPool, algorithm: ScanAlgorithm) -> None:
    waits = pool.run(exposed_waits, algorithm, ranks=4)
    alone = max(wait for wait, _ in waits)
    overlapped = max(wait for _, wait in waits)
    assert alone > DELAY_S
    assert overlapped < 0.5 * alone


def benchmark_ranks(rank: int, ranks: int, order: SequenceOrder) -> Report:
    problem = ScanProblem(state_mb=0.2, order=order, repeats=3, delay_s=0.01)
    return measure(problem, dist.group.WORLD, torch.device("cpu"))


def test_the_benchmark_has_a_pulse(pool: RankPool, tmp_path: Path) -> None:
    reports = pool.run(benchmark_ranks, ORDER, ranks=4)
    assert all(report.timings == reports[0].timings for report in reports)
    report = reports[0]
    assert [timing.algorithm for timing in report.timings] == [a.value for a in ALGORITHMS]
    assert all(timing.median_s >= timing.least_s > 0 for timing in report.timings)
    assert report.timings[3].bytes_sent == 2 * 4 * 50_000
    assert report.auto_of_best >= 1 and report.gain_over_all_gather > 0
    assert report.topology.island == 4
    path = tmp_path / "constants.json"
    save_topology(report.topology, path)
    assert load_topology(path) == report.topology
