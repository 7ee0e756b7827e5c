"""What the sweeps ask of whoever carries states from span to span, across ranks or in one process.

Shape suffixes: S local spans, B batch rows, D hidden, F ffn (the local shard under TP).
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from torch import Tensor


class Direction(Enum):
    """Which way a scan over spans runs: states go right, their gradients left."""

    FORWARD = "forward"
    REVERSE = "reverse"


class PendingCarries(Protocol):
    """A scan under way."""

    def provide(self, span: int, summary_BDF: Tensor) -> None:
        """Hand in the summary of local span ``span`` as soon as it exists; not written again."""
        ...

    def wait(self) -> Tensor:
        """``[S, B, D, F]``: what enters each local span, in local order; the caller may write."""
        ...


class CarryExchange(Protocol):
    """Combines span summaries across ranks; it knows every span's keep and where spans lie."""

    def needs_summary(self, direction: Direction) -> list[bool]:
        """By local span: whether the scan reads its summary (nobody needs the row's last)."""
        ...

    def share_factors(self, factors_SB: Tensor) -> Tensor:
        """Factors of all spans ``[all spans, B]``, in sequence order, from the local ``[S, B]``."""
        ...

    def open(
        self, like_SBDF: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> PendingCarries:
        """Begin an exclusive scan over the whole row's spans, before their summaries exist.

        ``like_SBDF`` gives shape, dtype and device. ``factors_SB``: those of all spans, as shared
        by ``share_factors``; each multiplies its span's keep. ``None``: all 1.

        FORWARD: from the left, ``c_{s+1} = k_s c_s + summary_s``, zero into the first span.
        REVERSE: from the right with the same keeps, ``c_{s-1} = k_s c_s + summary_s``, zero into
        the last span. A keep of 0 selects, it does not multiply.
        """
        ...
