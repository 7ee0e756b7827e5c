"""A rank's spans as nodes of the scan's path: flat views in, whole carries out, nothing sent.

Shape suffixes: S local spans (memory order), B batch rows; states are ``[S, B, ...]`` of any shape.
"""

from itertools import pairwise

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.layout import spans_of_rank
from megatron_ttt.parallel.scan_algorithms.problem import (
    Keeps,
    Route,
    ScanProblem,
    make_route,
    span_path,
)
from megatron_ttt.scan_words import SequenceOrder


class SpanRoute:
    """The path of nodes with the spans of each node, in the order of the scan.

    Args:
        keeps_SB: of all spans in sequence order, on the CPU.
        ranks, order, direction: of the scan.
        factors_SB: of all spans in sequence order, on the states' device; ``None``: all 1.
    """

    def __init__(
        self,
        keeps_SB: Tensor,
        *,
        ranks: int,
        order: SequenceOrder,
        direction: Direction,
        factors_SB: Tensor | None = None,
    ) -> None:
        self.path = span_path(ranks, order, direction)
        self.route: Route = make_route(
            keeps_SB, factors_SB, ranks=ranks, order=order, direction=direction
        )
        self.keeps_SB, self.factors_SB = keeps_SB, factors_SB
        self.ranks = ranks
        self.order = order

    def span_keeps(self, span: int) -> Keeps:
        """Keep of one span, counted in sequence order."""
        factors_B = None if self.factors_SB is None else self.factors_SB[span]
        return Keeps(self.keeps_SB[span].tolist(), factors_B)

    def local_nodes(self, rank: int) -> dict[int, list[int]]:
        """Nodes of ``rank``, each with its spans as memory indices, in the order of the scan."""
        memory = {s: i for i, s in enumerate(spans_of_rank(rank, self.ranks, self.order))}
        return {
            node: [memory[span] for span in self.path[node]]
            for node in self.route.nodes_of_rank[rank]
        }

    def needs_summary(self, rank: int) -> list[bool]:
        """By memory index: whether the span's summary is used (the last of the path's is not)."""
        last = self.path[-1][-1]
        return [span != last for span in spans_of_rank(rank, self.ranks, self.order)]


class LocalSpans:
    """Summaries handed in span by span, and the memory of the carries.

    ``like_SB``: gives shape ``[S, B, ...]``, dtype and device; its values are not read.
    """

    def __init__(
        self,
        like_SB: Tensor,
        whole: SpanRoute,
        *,
        rank: int,
        message_dtype: torch.dtype | None,
        blocks: int,
    ) -> None:
        self.carries_SB = torch.empty_like(like_SB, memory_format=torch.contiguous_format)
        self._flat = self.carries_SB.view(like_SB.shape[0], -1)
        self._members = whole.local_nodes(rank)
        self._needed = whole.needs_summary(rank)
        self._span_keeps = [
            whole.span_keeps(span) for span in spans_of_rank(rank, whole.ranks, whole.order)
        ]
        self._given: dict[int, Tensor] = {}
        self.summaries: dict[int, Tensor] = {}
        self.carries = {node: self._flat[spans[0]] for node, spans in self._members.items()}
        self.problem = ScanProblem(
            whole.route,
            rank,
            whole.ranks,
            elements=self._flat.shape[1],
            rows=like_SB.shape[1],
            message_dtype=message_dtype or like_SB.dtype,
            blocks=blocks,
        )
        if 0 in self.carries:
            self.carries[0].zero_()

    def provide(self, span: int, summary_B: Tensor) -> None:
        """Hand in the summary of local span ``span``; ignored where nobody needs it."""
        if not self._needed[span]:
            return
        assert span not in self._given, f"span {span} has its summary already"
        self._given[span] = summary_B.detach().contiguous().view(-1)
        for node, spans in self._members.items():
            if span in spans and all(s in self._given for s in spans):
                self.summaries[node] = self._joined(spans)

    def _joined(self, spans: list[int]) -> Tensor:
        """One summary of neighbouring spans."""
        summary = self._given[spans[0]]
        for span in spans[1:]:
            summary = self.problem.combine(self._span_keeps[span], summary, self._given[span])
        return summary

    @property
    def missing(self) -> list[int]:
        """Spans whose summary is still to be handed in."""
        return [s for s, needed in enumerate(self._needed) if needed and s not in self._given]

    def expand(self) -> None:
        """Fill the carries of a node's further spans from that of its first."""
        for spans in self._members.values():
            for before, span in pairwise(spans):
                self.problem.combine(
                    self._span_keeps[before],
                    self._flat[before],
                    self._given[before],
                    out=self._flat[span],
                )
