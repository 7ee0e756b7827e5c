"""Attention over the tiles of a plan by torch's flash kernel for CPUs, forward and backward.

    O = softmax(scale * Q K^T) V        over the keys that the plan lets a query see

Tiles of one block of queries are joined by their log-sums of exponentials, which are all that is
kept beside the inputs and the output: memory is linear in the tokens. FlashAttention-2
(arXiv 2307.08691), section 3; its backward needs nothing of a tile but the joined output and sums.

Shape letters: B batch rows, Q queries, K keys, A heads, G key/value groups, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.model.attention_plan import AttentionPlan, QueryBlock, Sight, Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    plan: AttentionPlan,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend: ``[B, A, Q, E]``, in the memory order of ``query``; queries outside the plan get 0.

    Args:
        query: ``[B, A, Q, E]``, the plan's queries, differentiable, on the CPU.
        key, value: ``[B, G, K, E]``, places 0 to K - 1 of the rows, differentiable.
        plan: what they see.
        window: keys that a query sees, its own included; ``None``: all before it.
        scale: of the products.
    """
    attended: Tensor = _BlockAttention.apply(query, key, value, plan, window, scale)
    return attended


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        window: int | None,
        scale: float,
    ) -> Tensor:
        output = torch.zeros_like(query)
        dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
        sums = query.new_zeros(query.shape[:3], dtype=dtype)
        for block in plan.blocks(window):
            some = _grouped(query, block, key.shape[1])
            joined: tuple[Tensor, Tensor] | None = None
            for keys, values, tile in _tiles(key, value, block, some):
                found = _forward(
                    some, keys, values, 0.0, tile.sight is Sight.CAUSAL,
                    attn_mask=_mask(plan, tile, window, some), scale=scale,
                )  # fmt: skip
                joined = found if joined is None else _join(*joined, *found)
            assert joined is not None
            _scatter(output, block, joined[0])
            _scatter(sums[..., None], block, joined[1][..., None])
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.plan, ctx.window, ctx.scale = plan, window, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        plan, window = ctx.plan, ctx.window
        groups = key.shape[1]
        d_query = torch.zeros_like(query)
        # Several tiles add to a key: in fp32 at least.
        dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
        d_key, d_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value))
        for block in plan.blocks(window):
            some, above, below, log_sums = (
                _grouped(tensor, block, groups)
                for tensor in (query, d_output, output, sums[..., None])
            )
            for keys, values, tile in _tiles(key, value, block, some):
                parts = _backward(
                    above, some, keys, values, below, log_sums[..., 0], 0.0,
                    tile.sight is Sight.CAUSAL,
                    attn_mask=_mask(plan, tile, window, some), scale=ctx.scale,
                )  # fmt: skip
                _scatter(d_query, block, parts[0], add=True)
                for total, part in ((d_key, parts[1]), (d_value, parts[2])):
                    heads = part.unflatten(0, (-1, groups))  # [B, G, A / G, K, E]
                    total[block.rows, :, tile.keys] += heads.sum(dim=2, dtype=dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _grouped(tensor: Tensor, block: QueryBlock, groups: int) -> Tensor:
    """Return a block's queries ``[B * G, A / G, Q, E]``: a group's heads share its keys."""
    return tensor[block.rows, :, block.queries].unflatten(1, (groups, -1)).flatten(0, 1)


def _scatter(tensor: Tensor, block: QueryBlock, part: Tensor, *, add: bool = False) -> None:
    """Undo :func:`_grouped`, into ``[B, A, Q, E]``."""
    there = tensor[block.rows, :, block.queries]
    part = part.unflatten(0, (there.shape[0], -1)).flatten(1, 2)
    if add:
        there += part
    else:
        there.copy_(part)


def _tiles(
    key: Tensor, value: Tensor, block: QueryBlock, some: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tile]]:
    """Yield keys and values ``[B * G, A / G, K, E]`` of a block's tiles; heads share memory."""
    heads = some.shape[1]
    for tile in block.tiles:
        keys, values = (
            tensor[block.rows, :, tile.keys].flatten(0, 1)[:, None].expand(-1, heads, -1, -1)
            for tensor in (key, value)
        )
        yield keys, values, tile


def _mask(plan: AttentionPlan, tile: Tile, window: int | None, some: Tensor) -> Tensor | None:
    if tile.sight is not Sight.BAND:
        return None
    assert window is not None
    queries = some.shape[2]
    band = plan.band(window, some.dtype, some.device)
    return band[:queries, : queries + window - 1]


def _join(
    one: Tensor, one_sums: Tensor, other: Tensor, other_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax over two sets of keys, from that over each and its log-sum."""
    sums = torch.logaddexp(one_sums, other_sums)
    shares = [(part - sums).exp()[..., None] for part in (one_sums, other_sums)]
    return (one * shares[0] + other * shares[1]).to(one.dtype), sums
