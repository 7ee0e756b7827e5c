"""How long each scan takes and what it sends, as functions of ranks, state and network.

Hockney's model: a message of b bytes takes ``alpha + beta * b``. A rank has one port each way per
kind of link (full duplex): inside its island (NVLink, a node) and between islands (one network card
a rank). Ranks that share processor cores (gloo on one machine) also share ``lanes``: the whole
island's messages and combining, divided by ``lanes``, bound the time from below.

Bytes are exact: what ``transport.py`` counts. Times are closed forms; ``tests/simulator.py`` runs
the programs themselves and agrees with them to about a third.

P ranks, N nodes (see ``problem.py``: zigzag 2P-1, contiguous P), S bytes of one state (its batch
rows together, in the dtype that travels), m blocks of the ring.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.parallel.scan_algorithms.problem import split
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

MOST_BLOCKS = 4096
LEAST_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Link:
    """``alpha_s``: seconds a message costs. ``beta_s_per_byte``: seconds a byte costs."""

    alpha_s: float
    beta_s_per_byte: float

    def seconds(self, size: float) -> float:
        return self.alpha_s + self.beta_s_per_byte * size


@dataclass(frozen=True)
class Topology:
    """``island``: neighbouring ranks joined by ``intra``; islands are joined by ``inter``.

    ``combine_s_per_byte``: time of ``k * a + b`` per byte of the result. ``lanes``: how many
    messages an island moves at once; None: as many as it has ranks.
    """

    island: int
    intra: Link
    inter: Link
    combine_s_per_byte: float = 0.0
    lanes: float | None = None


# Nodes of 8 GPUs with NVLink 4 and one 400 Gbit/s card per GPU, at the rates collectives reach.
# A message is a batched send or receive called from Python: about 80 us of the host's time before
# the network's 13 between nodes counts. Estimated; `tools/benchmark.py scan` measures it.
GPU_CLUSTER = Topology(8, Link(80e-6, 1 / 320e9), Link(93e-6, 1 / 42e9), 1 / 900e9)
# Processes of one machine that talk through gloo; `tools/benchmark.py scan` measures the real one.
CPU_MACHINE = Topology(1 << 20, Link(2e-4, 1 / 2.5e9), Link(2e-4, 1 / 2.5e9), 1 / 7e9, 1.2)


@dataclass(frozen=True)
class Prediction:
    """What one scan costs.

    ``bytes_sent`` and ``messages`` by the rank that sends most; ``rounds`` one after the other;
    ``states_held`` per rank beside its own carries.
    """

    algorithm: ScanAlgorithm
    seconds: float
    bytes_sent: int
    messages: int
    rounds: int
    states_held: float
    blocks: int = 1


def count_nodes(ranks: int, order: SequenceOrder) -> int:
    """Nodes of the path."""
    return ranks if order is SequenceOrder.contiguous else 2 * ranks - 1


def _nodes_of(rank: int, ranks: int, order: SequenceOrder, direction: Direction) -> list[int]:
    if order is SequenceOrder.contiguous:
        return [rank if direction is Direction.FORWARD else ranks - 1 - rank]
    back = 2 * (ranks - 1) - rank
    return [rank] if back == rank else [rank, back]


def traffic(
    algorithm: ScanAlgorithm,
    *,
    rank: int,
    ranks: int,
    order: SequenceOrder,
    elements: int,
    blocks: int = 1,
    direction: Direction = Direction.FORWARD,
) -> tuple[int, int]:
    """Elements and messages that ``rank`` sends in one scan of states of ``elements``."""
    held = [_nodes_of(r, ranks, order, direction) for r in range(ranks)]
    last = count_nodes(ranks, order) - 1
    if last == 0:
        return 0, 0
    senders = sum(node != last for node in held[rank])
    if algorithm is ScanAlgorithm.all_gather:
        return senders * elements * (ranks - 1), (ranks - 1) * (senders > 0)
    if algorithm is ScanAlgorithm.ring:
        return senders * elements, senders * min(blocks, elements)
    if algorithm is ScanAlgorithm.doubling:
        sent = 0
        for node in held[rank]:
            steps = (node + (1 << level) for level in range((last - node).bit_length()))
            sent += sum(to not in held[rank] for to in steps if to <= last)
        return sent * elements, sent
    sizes = [end - begin for begin, end in split(elements, ranks)]
    receivers = [sum(node != 0 for node in nodes) for nodes in held]
    others = [r for r in range(ranks) if r != rank]
    given = senders * sum(sizes[r] for r in others)
    returned = sizes[rank] * sum(receivers[r] for r in others)
    messages = (senders > 0) * sum(sizes[r] > 0 for r in others)
    messages += (sizes[rank] > 0) * sum(receivers[r] > 0 for r in others)
    return given + returned, messages


def predict(
    algorithm: ScanAlgorithm,
    *,
    ranks: int,
    order: SequenceOrder,
    state_bytes: int,
    topology: Topology,
    blocks: int | None = None,
) -> Prediction:
    """One scan's time and traffic; ``blocks`` None: the best number for ``ring``."""
    if algorithm is ScanAlgorithm.ring and blocks is None:
        blocks = best_blocks(ranks=ranks, order=order, state_bytes=state_bytes, topology=topology)
    blocks = blocks or 1
    model = _Model(ranks, order, state_bytes, topology)
    seconds, rounds, held = {
        ScanAlgorithm.all_gather: model.all_gather,
        ScanAlgorithm.all_to_all: model.all_to_all,
        ScanAlgorithm.doubling: model.doubling,
        ScanAlgorithm.ring: lambda: model.ring(blocks),
    }[algorithm]()
    most = [
        traffic(algorithm, rank=r, ranks=ranks, order=order, elements=state_bytes, blocks=blocks)
        for r in sorted({0, ranks // 4, ranks // 2, ranks - 1} | ({1} if ranks > 1 else set()))
    ]
    return Prediction(
        algorithm,
        seconds,
        max(size for size, _ in most),
        max(count for _, count in most),
        rounds,
        held,
        blocks,
    )


def best_blocks(*, ranks: int, order: SequenceOrder, state_bytes: int, topology: Topology) -> int:
    """Return the number of blocks (a power of two) at which ``ring`` is fastest."""
    model = _Model(ranks, order, state_bytes, topology)
    most = max(1, min(MOST_BLOCKS, state_bytes // LEAST_BLOCK_BYTES))
    candidates = [1 << power for power in range(most.bit_length())]
    return min(candidates, key=lambda blocks: model.ring(blocks)[0])


def choose(*, ranks: int, order: SequenceOrder, state_bytes: int, topology: Topology) -> Prediction:
    """Return what ``auto`` takes: the algorithm of the least predicted time."""
    predictions = [
        predict(algorithm, ranks=ranks, order=order, state_bytes=state_bytes, topology=topology)
        for algorithm in ALGORITHMS
    ]
    return min(predictions, key=lambda prediction: prediction.seconds)


@dataclass(frozen=True)
class _Model:
    """Closed forms; each returns seconds, rounds, states held."""

    ranks: int
    order: SequenceOrder
    state_bytes: int
    topology: Topology

    @property
    def nodes(self) -> int:
        return count_nodes(self.ranks, self.order)

    @property
    def doubled(self) -> int:
        """States of an inner rank: its nodes."""
        return 2 if self.order is SequenceOrder.zigzag and self.ranks > 2 else 1

    @property
    def inside(self) -> int:
        """Ranks of one island."""
        return min(self.ranks, self.topology.island)

    def _combine(self, states: float) -> float:
        return self.topology.combine_s_per_byte * self.state_bytes * states

    def _shared(self, seconds: float, messages: float, states: float, combined: float) -> float:
        """No faster than the island's lanes; arguments are an island's totals."""
        if self.topology.lanes is None:
            return seconds
        link = self.topology.intra
        work = messages * link.alpha_s + link.beta_s_per_byte * states * self.state_bytes
        return max(seconds, (work + self._combine(combined)) / self.topology.lanes)

    def _everyone(self, size: float) -> float:
        """Each rank sends ``size`` bytes to every other rank."""
        inside, outside = self.inside - 1, self.ranks - self.inside
        intra, inter = self.topology.intra, self.topology.inter
        return max(inside * intra.seconds(size), outside * inter.seconds(size))

    def all_gather(self) -> tuple[float, int, float]:
        peers, folded = self.ranks - 1, max(self.nodes - 2, 0)
        seconds = self._everyone(self.doubled * self.state_bytes) + self._combine(folded)
        sent = (self.nodes - 1) * peers * self.inside / self.ranks
        # On average a rank folds half of the path (zigzag: up to its second node, three quarters).
        share = 0.75 if self.order is SequenceOrder.zigzag else 0.5
        combined = self.inside * share * folded
        return self._shared(seconds, self.inside * peers, sent, combined), 1, self.nodes - 1

    def all_to_all(self) -> tuple[float, int, float]:
        peers, scanned = self.ranks - 1, max(self.nodes - 2, 0)
        part = self.doubled * self.state_bytes / self.ranks
        seconds = 2 * self._everyone(part) + self._combine(scanned / self.ranks)
        share = self.inside / self.ranks
        sent = 2 * (self.nodes - 1) * peers / self.ranks * share
        shared = self._shared(seconds, 2 * self.inside * peers, sent, scanned * share)
        return shared, 2, 2 * self.doubled

    def doubling(self) -> tuple[float, int, float]:
        intra, inter = self.topology.intra, self.topology.inter
        rounds = (self.nodes - 1).bit_length()
        seconds = messages = 0.0
        for level in range(rounds):
            distance = 1 << level
            if self.order is SequenceOrder.zigzag and distance == self.nodes - 1:
                continue  # the one pair of this round lies on rank 0
            both = self.doubled if distance < self.ranks - 1 else 1
            if self.ranks <= self.topology.island:
                seconds += both * intra.seconds(self.state_bytes)
            elif 2 * distance > self.topology.island:
                seconds += both * inter.seconds(self.state_bytes)
            else:  # at an island's edge one of a rank's two messages leaves the island
                seconds += max(
                    inter.seconds(self.state_bytes), both * intra.seconds(self.state_bytes)
                )
            seconds += self._combine(both * (2 if 0 < level < rounds - 1 else 1))
            messages += self.nodes - distance
        share = self.inside / self.ranks
        shared = self._shared(seconds, messages * share, messages * share, 2 * messages * share)
        return shared, rounds, 2 * self.doubled

    def ring(self, blocks: int) -> tuple[float, int, float]:
        block = self.state_bytes / blocks
        combine = self._combine(1 / blocks)
        intra = self.topology.intra.seconds(block)
        inter = self.topology.inter.seconds(block)
        turns = self.nodes - 1
        islands = -(-self.ranks // self.topology.island)
        crossings = (islands - 1) * (2 if self.doubled == 2 else 1)
        # A rank with both neighbours in its island sends two blocks a slot through one port.
        slot = self.doubled * intra if self.inside > 2 else intra if self.inside > 1 else 0.0
        if islands > 1:
            slot = max(slot, inter if self.inside > 1 else self.doubled * inter)
        slot += self.doubled * combine
        first = crossings * inter + (turns - crossings) * intra + max(turns - 1, 0) * combine
        seconds = first + (blocks - 1) * slot
        share = self.inside / self.ranks
        shared = self._shared(
            seconds, turns * blocks * share, turns * share, max(turns - 1, 0) * share
        )
        return shared, turns + blocks - 1 if turns else 0, self.doubled / blocks


def fit_link(sizes: Sequence[int], seconds: Sequence[float]) -> Link:
    """Least squares of ``alpha + beta * size`` in relative error; neither below zero."""
    weights = [1 / second for second in seconds]
    w0 = sum(w * w for w in weights)
    w1 = sum(w * w * size for w, size in zip(weights, sizes, strict=True))
    w2 = sum(w * w * size * size for w, size in zip(weights, sizes, strict=True))
    y0 = sum(weights)
    y1 = sum(w * size for w, size in zip(weights, sizes, strict=True))
    determinant = w0 * w2 - w1 * w1
    if determinant <= 0:
        raise ValueError(f"sizes {list(sizes)} do not tell alpha from beta")
    alpha = (w2 * y0 - w1 * y1) / determinant
    beta = (w0 * y1 - w1 * y0) / determinant
    if alpha < 0:
        alpha, beta = 0.0, y1 / w2
    if beta < 0:
        alpha, beta = y0 / w0, 0.0
    return Link(alpha, beta)


def save_topology(topology: Topology, path: Path) -> None:
    """Write the constants as JSON, for ``parallel.scan_constants``."""
    path.write_text(json.dumps(asdict(topology), indent=2) + "\n")


def load_topology(path: Path) -> Topology:
    """Read what :func:`save_topology` wrote. Raises ``ValueError`` naming what is wrong."""
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    try:
        intra, inter = Link(**values.pop("intra")), Link(**values.pop("inter"))
        topology = Topology(intra=intra, inter=inter, **values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the constants of a topology: {error}") from error
    positive = [topology.island >= 1, topology.lanes is None or topology.lanes > 0]
    costs = [topology.combine_s_per_byte]
    costs += [cost for link in (intra, inter) for cost in (link.alpha_s, link.beta_s_per_byte)]
    if not all(positive) or min(costs) < 0:
        raise ValueError(f"{path}: sizes must be positive and costs not negative: {values}")
    return topology
