"""Ranks as threads of this process, for functions that take a reducer or an exchange.

Shape suffixes: S spans, B batch rows, D hidden, F ffn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from tests.unit.fast_weights.cases import Collecting, SpansInOrder

Result = TypeVar("Result")


class InThreads:
    """Runs one function per rank and lets the ranks gather tensors from each other."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.posted: list[Tensor] = [torch.empty(0)] * ranks

    def run(self, function: Callable[[int], Result]) -> list[Result]:
        def guarded(rank: int) -> Result:
            try:
                return function(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(guarded, range(self.ranks)))

    def gather(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.posted[rank] = tensor.clone()
        self.barrier.wait()
        gathered = list(self.posted)
        self.barrier.wait()  # nobody posts again before everybody has read
        return gathered


class ThreadedExchange:
    """Gathers every rank's span summaries and scans the whole row on each."""

    def __init__(
        self,
        ranks: InThreads,
        rank: int,
        held: tuple[tuple[int, int], ...],
        keeps_SB: Tensor,
    ) -> None:
        self.ranks, self.rank, self.held = ranks, rank, held
        self.row = SpansInOrder(keeps_SB)

    def needs_summary(self, direction: Direction) -> list[bool]:
        of_row = self.row.needs_summary(direction)
        return [of_row[span] for span in self.held[self.rank]]

    def share_factors(self, factors_SB: Tensor) -> Tensor:
        return self._whole_row(factors_SB)

    def open(
        self, like_SBDF: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> Collecting:
        return Collecting(self, like_SBDF, direction, factors_SB)

    def start(
        self, summaries_SBDF: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> ThreadedExchange:
        whole = self._whole_row(summaries_SBDF)
        self.row.start(whole, direction=direction, factors_SB=factors_SB)
        return self

    def _whole_row(self, local: Tensor) -> Tensor:
        gathered = self.ranks.gather(self.rank, local)
        place = {span: (r, i) for r, spans in enumerate(self.held) for i, span in enumerate(spans)}
        return torch.stack([gathered[place[s][0]][place[s][1]] for s in sorted(place)])

    def wait(self) -> Tensor:
        return self.row.wait()[list(self.held[self.rank])]
