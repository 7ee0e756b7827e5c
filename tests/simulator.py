"""Runs the scan's real programs on thousands of simulated ranks in one process, with a clock.

Messages are delivered by an event queue. A rank has one sending and one receiving port per kind of
link (full duplex); a message occupies first the one, then, as soon as it has begun and the port is
free, the other, each for ``alpha + beta * bytes`` (Hockney's model, cut-through, a network that
buffers). A rank's own combining costs ``combine_s_per_byte``. A tensor is read when it has
*arrived*, so a program that overwrites what it has sent always computes wrongly here.
"""

import gc
import heapq
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.cost import Topology
from megatron_ttt.parallel.scan_algorithms import PROGRAMS
from megatron_ttt.parallel.scan_algorithms.problem import (
    Exchange,
    Message,
    Need,
    Program,
    ScanProblem,
)
from megatron_ttt.parallel.spans import LocalSpans, SpanRoute
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


@dataclass
class Simulation:
    """``carries_PSB``: per rank ``[S, B, ...]`` in memory order; times in simulated seconds."""

    carries_PSB: list[Tensor]
    seconds: float
    finished_s: list[float]
    bytes_sent: list[int]
    messages_sent: list[int]


@dataclass
class _Rank:
    program: Program
    problem: ScanProblem
    spans: LocalSpans
    clock_s: float = 0.0
    waiting: Sequence[Message] = ()
    missing: int = 0
    combined: int = 0
    bytes_sent: int = 0
    messages_sent: int = 0
    finished: bool = False


class Trip(NamedTuple):
    """A message's journey: when its sender's port took it up and when it was there."""

    source: int
    to: int
    begin_s: float
    end_s: float


class _Leaving(NamedTuple):
    """A message at the head of its sender's port; ``inner``: it stays in the island."""

    peer: int
    tensor: Tensor
    inner: bool
    occupied_s: float


@dataclass
class _Network:
    """Ports, events and messages under way. ``scale``: nominal bytes per byte really held.

    Events are ``(time, count, rank, leaving)``: with nothing leaving the rank goes on.
    """

    topology: Topology
    scale: float
    trips: list[Trip] | None
    events: list[tuple[float, int, int, _Leaving | None]] = field(default_factory=list)
    count: int = 0
    sending: dict[tuple[int, bool], float] = field(default_factory=lambda: defaultdict(float))
    receiving: dict[tuple[int, bool], float] = field(default_factory=lambda: defaultdict(float))
    arriving: dict[tuple[int, int], deque[tuple[float, Tensor]]] = field(
        default_factory=lambda: defaultdict(deque)
    )

    def schedule(self, time: float, rank: int, leaving: _Leaving | None = None) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, rank, leaving))

    def post(self, source: int, message: Message, now: float) -> None:
        """Queue a message at its sender's port."""
        inner = source // self.topology.island == message.peer // self.topology.island
        link = self.topology.intra if inner else self.topology.inter
        occupied = link.seconds(message.tensor.nbytes * self.scale)
        begin = max(now, self.sending[source, inner])
        self.sending[source, inner] = begin + occupied
        self.schedule(begin, source, _Leaving(*message, inner, occupied))

    def leave(self, source: int, leaving: _Leaving, now: float) -> None:
        """The message begins to flow: queue it at its receiver's port."""
        port = leaving.peer, leaving.inner
        end = max(now, self.receiving[port]) + leaving.occupied_s
        self.receiving[port] = end
        self.arriving[source, leaving.peer].append((end, leaving.tensor))
        if self.trips is not None:
            self.trips.append(Trip(source, leaving.peer, now, end))


def simulate(
    states_PSB: Sequence[Tensor],
    all_keeps_SB: Tensor,
    *,
    order: SequenceOrder,
    algorithm: ScanAlgorithm,
    topology: Topology,
    direction: Direction = Direction.FORWARD,
    message_dtype: torch.dtype | None = None,
    blocks: int = 1,
    nominal_bytes: float | None = None,
    trips: list[Trip] | None = None,
    factors_SB: Tensor | None = None,
) -> Simulation:
    """The exclusive scan on ``len(states_PSB)`` simulated ranks.

    ``states_PSB``: each rank's summaries ``[S, B, ...]`` in memory order. ``all_keeps_SB``: every
    span's keep in sequence order; ``factors_SB`` likewise, or None. ``nominal_bytes``: what one
    state (all its rows) is taken to weigh by the clock; None: what it weighs. ``trips``: is given
    every message's journey.
    """
    ranks = len(states_PSB)
    route = SpanRoute(
        all_keeps_SB, ranks=ranks, order=order, direction=direction, factors_SB=factors_SB
    )
    members = []
    for rank, states in enumerate(states_PSB):
        spans = LocalSpans(states, route, rank=rank, message_dtype=message_dtype, blocks=blocks)
        for span in range(states.shape[0]):
            spans.provide(span, states[span])
        program = PROGRAMS[algorithm](spans.problem, spans.summaries, spans.carries)
        members.append(_Rank(program, spans.problem, spans))
    held = members[0].problem.elements * states_PSB[0].element_size()
    network = _Network(topology, 1.0 if nominal_bytes is None else nominal_bytes / held, trips)
    if ranks > 1:
        with _collector_paused():
            _deliver_all(members, network)
    for member in members:
        member.spans.expand()
    return Simulation(
        [member.spans.carries_SB for member in members],
        max(member.clock_s for member in members),
        [member.clock_s for member in members],
        [member.bytes_sent for member in members],
        [member.messages_sent for member in members],
    )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A million messages live at once, in no cycle: looking for cycles is a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _deliver_all(members: list[_Rank], network: _Network) -> None:
    for rank in range(len(members)):
        network.schedule(0.0, rank)
    awaited: set[tuple[int, int]] = set()
    while network.events:
        now, _, rank, leaving = heapq.heappop(network.events)
        if leaving is None:
            _go_on(members[rank], rank, now, network, awaited)
            continue
        network.leave(rank, leaving, now)
        if (rank, leaving.peer) in awaited:
            awaited.remove((rank, leaving.peer))
            members[leaving.peer].missing -= 1
            if members[leaving.peer].missing == 0:
                _resume(members[leaving.peer], leaving.peer, network)
    stuck = [rank for rank, member in enumerate(members) if not member.finished]
    assert not stuck, f"ranks {stuck[:8]} wait for messages that nobody sends"
    leftover = [pair for pair, messages in network.arriving.items() if messages]
    assert not leftover, f"messages that nobody receives: {leftover[:8]}"


def _go_on(
    member: _Rank, rank: int, now: float, network: _Network, awaited: set[tuple[int, int]]
) -> None:
    """Take in what has arrived, run the program to its next messages, post them."""
    member.clock_s = now
    for message in member.waiting:
        message.tensor.copy_(network.arriving[message.peer, rank].popleft()[1])
    request = _next_exchange(member, network)
    if request is None:
        member.finished = True
        return
    for message in request.sends:
        member.bytes_sent += message.tensor.nbytes
        member.messages_sent += 1
        network.post(rank, message, member.clock_s)
    member.waiting = request.receives
    absent = [m.peer for m in request.receives if not network.arriving[m.peer, rank]]
    awaited.update((peer, rank) for peer in absent)
    member.missing = len(absent)
    if not absent:
        _resume(member, rank, network)


def _next_exchange(member: _Rank, network: _Network) -> Exchange | None:
    """Run the program to its next messages and charge the clock for what it combined."""
    request: Exchange | Need | None = next(member.program, None)
    while isinstance(request, Need):  # simulated summaries exist from the start
        request = next(member.program, None)
    new = member.problem.combined_elements - member.combined
    member.combined = member.problem.combined_elements
    size = member.spans.carries_SB.element_size() * network.scale
    member.clock_s += network.topology.combine_s_per_byte * new * size
    return request


def _resume(member: _Rank, rank: int, network: _Network) -> None:
    arrivals = [network.arriving[message.peer, rank][0][0] for message in member.waiting]
    network.schedule(max([member.clock_s, *arrivals]), rank)
