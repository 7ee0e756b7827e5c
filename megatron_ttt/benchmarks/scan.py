"""Measures the scan on the ranks that are running: links, each algorithm, what overlap hides.

All ranks call :func:`measure`; the figures are equal on all of them (the slowest rank's).
"""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ttt.benchmarks.delayed_transport import DelayedTransport
from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.cost import Link, Topology, choose, fit_link, predict
from megatron_ttt.parallel.layout import spans_per_rank, total_spans
from megatron_ttt.parallel.scan import ScanGroup, SpanExchange
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.parallel.scan_algorithms.problem import Exchange, Message
from megatron_ttt.parallel.transport import Transport
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

LINK_SIZES = (4 << 10, 256 << 10, 2 << 20, 8 << 20)
PRIVATE_LANES = 0.8  # an island that moves nearly all its ranks' messages at once shares nothing


@dataclass(frozen=True)
class ScanProblem:
    """One state of ``state_mb`` (10**6 bytes of float32) in ``order``; ``repeats`` of each."""

    state_mb: float = 25.0
    order: SequenceOrder = SequenceOrder.zigzag
    repeats: int = 9
    delay_s: float = 0.05

    @property
    def elements(self) -> int:
        return round(self.state_mb * 1e6 / 4)


@dataclass(frozen=True)
class Timing:
    """Seconds are the slowest rank's, bytes those of the rank that sends most."""

    algorithm: str
    blocks: int
    median_s: float
    least_s: float
    predicted_s: float
    bytes_sent: int


@dataclass(frozen=True)
class Exposure:
    """Wait that stood still with slow links: awaited at once, and after independent work."""

    algorithm: str
    work_s: float
    alone_s: float
    overlapped_s: float


@dataclass(frozen=True)
class Report:
    ranks: int
    topology: Topology
    timings: list[Timing]
    exposures: list[Exposure]
    chosen: str  # by auto: the same call as naming it, so its time is that row's

    def median_s(self, algorithm: str) -> float:
        return next(t.median_s for t in self.timings if t.algorithm == algorithm)

    @property
    def best_s(self) -> float:
        return min(t.median_s for t in self.timings)

    @property
    def auto_of_best(self) -> float:
        return self.median_s(self.chosen) / self.best_s

    @property
    def gain_over_all_gather(self) -> float:
        return self.median_s(ScanAlgorithm.all_gather.value) / self.median_s(self.chosen)


def measure(problem: ScanProblem, group: Any, device: torch.device) -> Report:
    """Links first; the constants found serve the predictions and ``auto``."""
    topology = measure_topology(group, device)
    scans = ScanGroup(group, topology=topology)
    timings = time_algorithms(problem, scans, device)
    slow = ScanGroup(group, topology=topology, wrap_transport=_slow_links(problem.delay_s))
    exposures = (
        [_measure_exposure(problem, slow, algorithm) for algorithm in ALGORITHMS]
        if device.type == "cpu"
        else []
    )
    chosen = choose(
        ranks=scans.ranks,
        order=problem.order,
        state_bytes=4 * problem.elements,
        topology=topology,
    )
    return Report(scans.ranks, topology, timings, exposures, chosen.algorithm.value)


def measure_topology(group: Any, device: torch.device) -> Topology:
    """alpha and beta inside and between islands (hosts), the combining rate, shared lanes."""
    scans = ScanGroup(group)
    hosts: list[str] = [""] * scans.ranks
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    island = hosts.count(hosts[0])
    intra = _measure_link(scans, 1, device) if island > 1 else None
    inter = _measure_link(scans, island, device) if island < scans.ranks else None
    link = intra or inter
    if link is None:
        raise ValueError("one rank has no links to measure: start at least two")
    lanes = _measure_lanes(scans, island, intra, device) if intra is not None else None
    return Topology(island, intra or link, inter or link, _measure_combining(group, device), lanes)


def _measure_link(scans: ScanGroup, peer: int, device: torch.device) -> Link:
    """Ping-pong of ranks 0 and ``peer``; half a round trip is one message."""
    seconds = []
    for size in LINK_SIZES:
        tensor, back = torch.zeros(2, size, dtype=torch.uint8, device=device)
        transport = scans.transport("ping-pong")

        def pass_on(
            transport: Transport = transport, tensor: Tensor = tensor, back: Tensor = back
        ) -> None:
            if scans.rank == 0:
                transport.exchange(Exchange(sends=[Message(peer, tensor)]))
                transport.exchange(Exchange(receives=[Message(peer, back)]))
            elif scans.rank == peer:
                transport.exchange(Exchange(receives=[Message(0, back)]))
                transport.exchange(Exchange(sends=[Message(0, back)]))

        times = [_seconds(pass_on, scans.group, device) for _ in range(12)]
        seconds.append(statistics.median(times[3:]) / 2)
    return fit_link(LINK_SIZES, seconds)


def _measure_lanes(scans: ScanGroup, island: int, link: Link, device: torch.device) -> float | None:
    """Messages under way at once when every rank of the island passes one to its neighbour."""
    size = LINK_SIZES[-1]
    tensor, received = torch.zeros(2, size, dtype=torch.uint8, device=device)
    home = scans.rank // island * island
    to, source = ((scans.rank - home + step) % island + home for step in (1, -1))
    transport = scans.transport("shift")
    shift = Exchange([Message(to, tensor)], [Message(source, received)])
    times = [_seconds(lambda: transport.exchange(shift), scans.group, device) for _ in range(12)]
    lanes = island * link.seconds(size) / statistics.median(times[3:])
    return None if lanes > PRIVATE_LANES * island else lanes


def _measure_combining(group: Any, device: torch.device) -> float:
    """Seconds per byte of ``a + b``, all ranks at once."""
    a, b = torch.zeros(2, 4_000_000, device=device)
    times = [_seconds(lambda: torch.add(a, b, out=a), group, device) for _ in range(12)]
    return statistics.median(times[3:]) / a.nbytes


def time_algorithms(problem: ScanProblem, scans: ScanGroup, device: torch.device) -> list[Timing]:
    """Every algorithm in turn, ``repeats`` times, so that a busy moment meets all of them."""
    keeps = torch.ones(total_spans(scans.ranks, problem.order), 1)
    states = torch.randn(spans_per_rank(problem.order), 1, problem.elements, device=device)
    times: dict[ScanAlgorithm, list[float]] = {algorithm: [] for algorithm in ALGORITHMS}
    records = {}
    for _ in range(problem.repeats + 1):
        for algorithm in ALGORITHMS:
            exchange = SpanExchange(keeps, order=problem.order, group=scans, algorithm=algorithm)

            def scan(exchange: SpanExchange = exchange) -> None:
                pending = exchange.start(states, direction=Direction.FORWARD)
                pending.wait()
                records[exchange.algorithm] = pending.record

            times[algorithm].append(_seconds(scan, scans.group, device))
    situation: dict[str, Any] = {
        "ranks": scans.ranks,
        "order": problem.order,
        "state_bytes": 4 * problem.elements,
        "topology": scans.topology,
    }
    timings = []
    for algorithm in ALGORITHMS:
        predicted = predict(algorithm, **situation)
        most = torch.tensor(records[algorithm].bytes_sent, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=scans.group)
        timings.append(
            Timing(
                algorithm.value,
                records[algorithm].blocks,
                statistics.median(times[algorithm][1:]),
                min(times[algorithm][1:]),
                predicted.seconds,
                int(most),
            )
        )
    return timings


def _slow_links(delay_s: float) -> Callable[[Transport], Transport]:
    def wrap(transport: Transport) -> Transport:
        return DelayedTransport(transport, alpha_s=delay_s, beta_s_per_byte=0.0)

    return wrap


def _measure_exposure(problem: ScanProblem, slow: ScanGroup, algorithm: ScanAlgorithm) -> Exposure:
    """Links so slow that they, not the shared cores, make the wait; states small."""
    keeps = torch.ones(total_spans(slow.ranks, problem.order), 1)
    states = torch.randn(spans_per_rank(problem.order), 1, 1000)
    exchange = SpanExchange(keeps, order=problem.order, group=slow, algorithm=algorithm)

    def exposed(work_s: float) -> float:
        dist.barrier(group=slow.group)
        pending = exchange.start(states, direction=Direction.FORWARD)
        _work(work_s)
        pending.wait()
        return _slowest(pending.exposed_s, slow.group, states.device)

    exposed(0.0)
    alone = statistics.median(exposed(0.0) for _ in range(3))
    overlapped = statistics.median(exposed(alone) for _ in range(3))
    return Exposure(algorithm.value, alone, alone, overlapped)


def _work(seconds: float) -> None:
    """Independent products for about ``seconds``."""
    matrix = torch.ones(64, 64)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)


def _seconds(function: Callable[[], object], group: Any, device: torch.device) -> float:
    """Of the slowest rank, from a common start."""
    dist.barrier(group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _slowest(time.perf_counter() - began, group, device)


def _slowest(seconds: float, group: Any, device: torch.device) -> float:
    value = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return float(value)


def show(problem: ScanProblem, report: Report, console: Console) -> None:
    """Print the tables of ``tools/benchmark.py scan``."""
    topology = report.topology
    for name, link in (("inside an island", topology.intra), ("between islands", topology.inter)):
        console.print(
            f"{name}: alpha {link.alpha_s * 1e6:.1f} us, {1e-9 / link.beta_s_per_byte:.2f} GB/s"
        )
    shared = "private" if topology.lanes is None else f"{topology.lanes:.2f} lanes shared"
    console.print(
        f"island of {topology.island} rank(s), links {shared}, "
        f"combining {1e-9 / topology.combine_s_per_byte:.2f} GB/s"
    )
    table = Table(
        title=f"{report.ranks} {problem.order.value} ranks, a state of {problem.state_mb:g} MB, "
        f"median of {problem.repeats}"
    )
    for heading in ("algorithm", "blocks", "ms", "least ms", "predicted ms", "MB sent", "of best"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for t in report.timings:
        table.add_row(
            t.algorithm,
            str(t.blocks),
            f"{t.median_s * 1e3:.1f}",
            f"{t.least_s * 1e3:.1f}",
            f"{t.predicted_s * 1e3:.1f}",
            f"{t.bytes_sent / 1e6:.1f}",
            f"{t.median_s / report.best_s:.2f}",
        )
    console.print(table)
    console.print(
        f"auto takes {report.chosen}: {report.auto_of_best:.2f} of the best, "
        f"{report.gain_over_all_gather:.1f} times as fast as all_gather"
    )
    for exposure in report.exposures:
        console.print(
            f"links of {problem.delay_s * 1e3:g} ms, {exposure.algorithm}: exposed "
            f"{exposure.alone_s * 1e3:.1f} ms, {exposure.overlapped_s * 1e3:.1f} ms behind "
            f"{exposure.work_s * 1e3:.1f} ms of work"
        )


def as_record(problem: ScanProblem, report: Report) -> dict[str, Any]:
    """Everything, for a file."""
    return {"problem": {**asdict(problem), "order": problem.order.value}, "report": asdict(report)}
