"""A recomputed layer does not repeat its scan across ranks.

The carries that entered a layer's spans are what its backward needs anyway; with activation
recomputation they are kept from the first forward to the second, which then sends no message and
summarises nothing. The price is what a layer that is not recomputed keeps as well: its entering
states.
"""

from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.fast_weights.sweeps import PendingCarries
from megatron_ttt.parallel.scan import SpanExchange


class _Keeping:
    """A forward scan whose result is kept for the layer's second forward."""

    def __init__(self, pending: PendingCarries, kept: dict[int, Tensor], layer: int) -> None:
        self._pending, self._kept, self._layer = pending, kept, layer

    def provide(self, span: int, summary_BDF: Tensor) -> None:
        self._pending.provide(span, summary_BDF)

    def wait(self) -> Tensor:
        self._kept[self._layer] = self._pending.wait()
        return self._kept[self._layer].clone()  # the caller may write into what it is given


class _Kept:
    """The forward scan of a layer that runs for the second time."""

    def __init__(self, carries_SBDF: Tensor) -> None:
        self._carries_SBDF = carries_SBDF

    def provide(self, span: int, summary_BDF: Tensor) -> None:
        raise AssertionError("a remembered scan needs no summary")

    def wait(self) -> Tensor:
        return self._carries_SBDF


class RememberedScan:
    """One layer's exchange in one micro-batch, whose forward scan is made once.

    Args:
        exchange: of the layer.
        kept: the micro-batch's carries by layer; emptied as they are used.
        layer: from 0.
        will_run_again: this is the first of two forwards.
    """

    def __init__(
        self, exchange: SpanExchange, *, kept: dict[int, Tensor], layer: int, will_run_again: bool
    ) -> None:
        self._exchange, self._kept, self._layer = exchange, kept, layer
        self._will_run_again = will_run_again
        self._known = kept.pop(layer, None)  # this is the second forward

    def needs_summary(self, direction: Direction) -> list[bool]:
        """By local span; none when the carries are known."""
        needed = self._exchange.needs_summary(direction)
        if direction is Direction.FORWARD and self._known is not None:
            return [False] * len(needed)
        return needed

    def share_factors(self, factors_SB: Tensor) -> Tensor:
        """See :class:`SpanExchange`; shared in both forwards, since the backward needs them."""
        return self._exchange.share_factors(factors_SB)

    def open(
        self, like_SBDF: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> PendingCarries:
        """Begin the scan, or hand out the carries of the first forward."""
        if direction is Direction.FORWARD and self._known is not None:
            return _Kept(self._known)
        pending = self._exchange.open(like_SBDF, direction=direction, factors_SB=factors_SB)
        if direction is Direction.FORWARD and self._will_run_again:
            return _Keeping(pending, self._kept, self._layer)
        return pending
