"""The exclusive associative scan of span summaries across the ranks of a group.

    carry_0 = 0        carry_{s+1} = k_s * carry_s + S_s          (spans in sequence order)

Keeps are per batch row, in [0, 1]; a keep of 0 selects, so nothing of another document passes. The
gradient is the same scan from the right with the same keeps: with ``g_s = dL/dcarry_s``

    dS_s = r_s        r_last = 0        r_{s-1} = k_s * r_s + g_s

Four algorithms compute it (``scan_algorithms/``), ``auto`` picks one by ``cost.py``. All ranks of a
group must start the same scans in the same order.

Shape suffixes: S spans (local ones in memory order, or all in sequence order: said each time),
B batch rows; states are ``[S, B, ...]`` of any further shape.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.cost import CPU_MACHINE, GPU_CLUSTER, Topology, best_blocks, choose
from megatron_ttt.parallel.layout import spans_of_rank, spans_per_rank, total_spans
from megatron_ttt.parallel.pending import (
    LocalScan,
    Observer,
    PendingScan,
    ScanRecord,
    StreamScan,
    ThreadedScan,
)
from megatron_ttt.parallel.scan_algorithms import PROGRAMS
from megatron_ttt.parallel.scan_group import ScanGroup
from megatron_ttt.parallel.spans import LocalSpans, SpanRoute
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


class SpanExchange:
    """The scans of one micro-batch: its keeps, and how they travel. Serves every layer.

    Args:
        all_keeps_SB: ``[all spans, B]``, the whole row's keeps in sequence order, equal on all
            ranks; any device (copied to the host once).
        order: which spans this rank holds.
        group: a :class:`ScanGroup`, which remembers checked shapes and keeps scans apart; or a bare
            process group, or None for a single rank: then every scan is checked.
        algorithm: ``auto``: the fastest by the cost model.
        comm_dtype: of the messages; None: the states'.
        label: the layer, for errors.
        observer: is handed the :class:`ScanRecord` of every scan that has been waited for.

    Raises:
        ValueError: keeps outside [0, 1] or not of the group's spans.
    """

    def __init__(
        self,
        all_keeps_SB: Tensor,
        *,
        order: SequenceOrder,
        group: Any = None,
        algorithm: ScanAlgorithm = ScanAlgorithm.auto,
        comm_dtype: torch.dtype | None = None,
        label: str = "",
        observer: Observer | None = None,
    ) -> None:
        self.order = order
        self.group = ScanGroup.of(group)
        self.algorithm = algorithm
        self.comm_dtype = comm_dtype
        self.label = label
        self.observer = observer
        self._keeps_SB = _checked_keeps(all_keeps_SB, self.group.ranks, self.order)
        self._routes: dict[Direction, SpanRoute] = {}

    def for_layer(self, label: str, *, observer: Observer | None = None) -> "SpanExchange":
        """Return the same exchange under the label of another layer of the micro-batch."""
        other = copy.copy(self)
        other.label = label
        other.observer = observer or self.observer
        return other

    def needs_summary(self, direction: Direction) -> list[bool]:
        """By local span: whether the scan reads its summary (nobody needs the row's last)."""
        return self._route(direction).needs_summary(self.group.rank)

    def share_factors(self, factors_SB: Tensor) -> Tensor:
        """Factors of all spans ``[all spans, B]``, in sequence order, on the factors' device.

        Args:
            factors_SB: of this rank's spans, in local memory order. Small; one message to all.
        """
        group = self.group
        what = group.describe(None, self.label)
        gathered = group.gather(factors_SB, device=factors_SB.device, what=what)
        held = [spans_of_rank(rank, group.ranks, self.order) for rank in range(group.ranks)]
        places = {span: (r, i) for r, spans in enumerate(held) for i, span in enumerate(spans)}
        return torch.stack([gathered[r][i] for _, (r, i) in sorted(places.items())])

    def start(
        self, summaries_SB: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> PendingScan:
        """Begin the scan of this rank's ``[S, B, ...]`` summaries, in local memory order.

        The summaries are not to be written before ``wait`` has returned. Not recorded by autograd.
        """
        pending = self.open(summaries_SB, direction=direction, factors_SB=factors_SB)
        for span in self._order_of_use(direction):
            pending.provide(span, summaries_SB[span])
        return pending

    def open(
        self, like_SB: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> PendingScan:
        """Begin before the summaries exist: each is handed in with ``provide`` when it does.

        ``like_SB`` gives shape ``[S, B, ...]``, dtype and device; its values are not read.
        ``factors_SB``: those of all spans, from :meth:`share_factors`; they multiply the keeps.

        Raises ``ValueError`` where the shape does not fit order and keeps, or differs across ranks.
        """
        self._check_states(like_SB)
        group, route = self.group, self._route(direction, factors_SB)
        algorithm, blocks = self._resolve(like_SB)
        record = ScanRecord(algorithm, direction, blocks)
        what = group.describe(algorithm, self.label)
        if group.ranks > 1:
            self._check_across_ranks(like_SB, algorithm, blocks, direction, what)
        spans = LocalSpans(
            like_SB, route, rank=group.rank, message_dtype=self.comm_dtype, blocks=blocks
        )
        if group.ranks == 1:
            return LocalScan(spans, record, self.observer)
        program = PROGRAMS[algorithm](spans.problem, spans.summaries, spans.carries)
        transport = group.transport(what)
        if like_SB.is_cuda:
            return StreamScan(
                spans,
                record,
                self.observer,
                program=program,
                transport=transport,
                stream=group.stream(like_SB.device),
                watchdog=group.watchdog(),
                what=what,
            )
        return ThreadedScan(
            spans,
            record,
            self.observer,
            program=program,
            transport=transport,
            timeout_s=group.timeout_s,
            what=what,
        )

    def _route(self, direction: Direction, factors_SB: Tensor | None = None) -> SpanRoute:
        def make() -> SpanRoute:
            return SpanRoute(
                self._keeps_SB,
                ranks=self.group.ranks,
                order=self.order,
                direction=direction,
                factors_SB=factors_SB,
            )

        if factors_SB is not None:  # of one layer
            return make()
        if direction not in self._routes:
            self._routes[direction] = make()
        return self._routes[direction]

    def _order_of_use(self, direction: Direction) -> Sequence[int]:
        spans = range(spans_per_rank(self.order))
        return spans if direction is Direction.FORWARD else spans[::-1]

    def _check_states(self, like_SB: Tensor) -> None:
        spans, rows = spans_per_rank(self.order), self._keeps_SB.shape[1]
        if like_SB.dim() < 2 or like_SB.shape[0] != spans or like_SB.shape[1] != rows:
            raise ValueError(
                f"states {list(like_SB.shape)} are not [{spans}, {rows}, ...]: {spans} span(s) per "
                f"rank in {self.order.value} order, keeps of {rows} row(s)"
            )
        if not like_SB.dtype.is_floating_point or not like_SB.numel():
            raise ValueError(f"states of {like_SB.dtype}, {list(like_SB.shape)}, cannot be scanned")

    def _resolve(self, like_SB: Tensor) -> tuple[ScanAlgorithm, int]:
        """Return the algorithm, and the blocks of a ring."""
        dtype = self.comm_dtype or like_SB.dtype
        situation = {
            "ranks": self.group.ranks,
            "order": self.order,
            "state_bytes": like_SB[0].numel() * dtype.itemsize,
            "topology": self.group.topology or default_topology(like_SB.device),
        }
        if self.algorithm is ScanAlgorithm.auto:
            chosen = choose(**situation)  # type: ignore[arg-type]
            return chosen.algorithm, chosen.blocks
        if self.algorithm is ScanAlgorithm.ring:
            return self.algorithm, best_blocks(**situation)  # type: ignore[arg-type]
        return self.algorithm, 1

    def _check_across_ranks(
        self,
        like_SB: Tensor,
        algorithm: ScanAlgorithm,
        blocks: int,
        direction: Direction,
        what: str,
    ) -> None:
        travels = self.comm_dtype or like_SB.dtype
        self.group.check_equal(
            f"states {list(like_SB.shape)} of {like_SB.dtype}, sent as {travels}, "
            f"{self.order.value} order, {algorithm.value} in {blocks} block(s), {direction.value}",
            device=like_SB.device,
            what=what,
        )


def default_topology(device: torch.device) -> Topology:
    """Constants where none were measured."""
    return GPU_CLUSTER if device.type == "cuda" else CPU_MACHINE


def _checked_keeps(all_keeps_SB: Tensor, ranks: int, order: SequenceOrder) -> Tensor:
    spans = total_spans(ranks, order)
    if all_keeps_SB.dim() != 2 or all_keeps_SB.shape[0] != spans:
        raise ValueError(
            f"keeps {list(all_keeps_SB.shape)} are not [{spans}, batch rows]: {ranks} "
            f"{order.value} rank(s) hold {spans} span(s)"
        )
    keeps_SB = all_keeps_SB.detach().to("cpu", torch.float64)
    wrong = ~((keeps_SB >= 0) & (keeps_SB <= 1))  # a NaN is wrong, too
    if wrong.any():
        span, row = (int(index) for index in wrong.nonzero()[0])
        raise ValueError(
            f"keep {keeps_SB[span, row].item()} of span {span}, row {row} is outside [0, 1]"
        )
    return keeps_SB


__all__ = [
    "ScanGroup",
    "SpanExchange",
]
