"""Differentiable collectives that Megatron-core lacks: sequence order, gradients of any strides.

Shape letters: P ranks, T tokens of the whole row, L = T / P local tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.parallel.layout import SequenceOrder, token_ranges


class _GatherSequence(torch.autograd.Function):
    """Forward: all-gather along dimension 0. Backward: reduce-scatter of everyone's gradient.

    ``torch.distributed.nn.functional.all_gather`` would serve, but its backward fails on
    subgroups of the world.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, index: Tensor, inverse: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, local.shape[0]
        ctx.save_for_backward(inverse)
        gathered = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        local = grad.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad[inverse], group=ctx.group)
        return local, None, None, None


def gather_sequence(local: Tensor, *, group: Any, order: SequenceOrder) -> Tensor:
    """The whole sequence from every rank's tokens.

    Args:
        local: ``[L, ...]``, this rank's tokens in memory order (its spans, one after another).
        group: context-parallel group; ``None`` or of one rank returns ``local``.
        order: how spans are dealt to ranks.

    Returns:
        ``[T, ...]`` in sequence order on every rank. The gradient of a token is summed over the
        ranks that used it and returned to its owner.
    """
    if group is None or group.size() == 1:
        return local
    length = local.shape[0] * group.size()
    # Place i of the rank-major gather holds token source[i]; index undoes it.
    source = torch.cat(
        [
            torch.arange(start, end)
            for rank in range(group.size())
            for start, end in token_ranges(rank, group.size(), order, length)
        ]
    ).to(local.device)
    index = torch.empty_like(source)
    index[source] = torch.arange(length, device=local.device)
    return _GatherSequence.apply(local, index, source, group)


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
    """A tensor that every rank of ``group`` holds whole and each uses for a part of the work.

    Returns the tensor; in the backward the ranks' partial gradients are summed.
    """
    return tensor if group.size() == 1 else _Replicate.apply(tensor, group)
