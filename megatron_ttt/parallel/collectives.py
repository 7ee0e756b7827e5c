"""Differentiable collectives that Megatron-core lacks: sequence order, gradients of any strides.

Shape letters: P ranks, T tokens of the whole row, L = T / P local tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.parallel.layout import token_ranges
from megatron_ttt.scan_words import SequenceOrder


class _GatherSequences(torch.autograd.Function):
    """Forward: all-gather along dimension 0. Backward: reduce-scatter of everyone's gradient.

    All tensors are in flight together. ``torch.distributed.nn.functional.all_gather`` would serve,
    but its backward fails on subgroups of the world. Spans are put in order by slices: an index
    would have to be sent to the device.
    """

    @staticmethod
    def forward(
        ctx: Any, spans: list[tuple[int, int]], group: Any, *local: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.spans, ctx.group = spans, group
        length = local[0].shape[0] * group.size()
        gathered = [part.new_empty(length, *part.shape[1:]) for part in local]
        flights = [
            dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=True)
            for whole, part in zip(gathered, local, strict=True)
        ]
        for flight in flights:
            flight.wait()
        size = length // len(spans)
        places = sorted(range(len(spans)), key=lambda place: spans[place])
        return tuple(
            torch.cat([whole[place * size : (place + 1) * size] for place in places])
            for whole in gathered
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = grads[0].shape[0] // ctx.group.size()
        local = [grad.new_empty(rows, *grad.shape[1:]) for grad in grads]
        # The reordered gradients are kept until they have been sent.
        ordered = [torch.cat([grad[start:end] for start, end in ctx.spans]) for grad in grads]
        flights = [
            dist.reduce_scatter_tensor(part, whole, group=ctx.group, async_op=True)
            for part, whole in zip(local, ordered, strict=True)
        ]
        for flight in flights:
            flight.wait()
        return None, None, *local


def gather_sequences(*local: Tensor, group: Any, order: SequenceOrder) -> tuple[Tensor, ...]:
    """Gather the whole sequence of each tensor from every rank's tokens, all at once.

    Args:
        local: ``[L, ...]`` each, this rank's tokens in memory order (its spans, one after another).
        group: context-parallel group; ``None`` or of one rank returns ``local``.
        order: how spans are dealt to ranks.

    Returns:
        ``[T, ...]`` each, in sequence order on every rank. The gradient of a token is summed over
        the ranks that used it and returned to its owner.
    """
    if group is None or group.size() == 1:
        return local
    length = local[0].shape[0] * group.size()
    # The gather's result holds the ranks' spans one after another, rank by rank.
    spans = [
        span
        for rank in range(group.size())
        for span in token_ranges(rank, group.size(), order, length)
    ]
    whole: tuple[Tensor, ...] = _GatherSequences.apply(spans, group, *local)
    return whole


class _Replicate(torch.autograd.Function):
    """Forward: identity. Backward: sum of every rank's gradient.

    Megatron's own function reduces ``grad.contiguous()`` in place and returns ``grad``, so that
    the sum is lost whenever the gradient arrives transposed.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def replicate(tensor: Tensor, *, group: Any) -> Tensor:
    """Return a tensor that all ranks of ``group`` hold whole, each using it for its own part.

    Returns the tensor; in the backward the ranks' partial gradients are summed.
    """
    return tensor if group.size() == 1 else _Replicate.apply(tensor, group)
