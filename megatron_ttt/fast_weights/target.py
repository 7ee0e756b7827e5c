"""The target a key should retrieve: ``V = conv(U) @ W_target``.

``conv`` is depthwise, without bias; which tokens its taps read ``rule.conv_offsets`` says. As
published it is a centred cross-correlation over 5 (tap 2 is the token itself, tap 3 the next one);
it may be causal, or one frozen tap on the next token, ``V_t = U_{t+1} @ W_target``. It sees zeros
beyond the chunk's and the document's edges, so although it looks ahead nothing leaks: a chunk's
targets are used only from the next chunk on, and a rank that holds whole chunks needs no
neighbour's tokens. ``W_target`` multiplies from the right.
In-Place TTT (arXiv 2604.06169) section 3; the frozen tap: TTT-NTP (arXiv 2606.21803).

Shape suffixes: B batch rows, T tokens, D hidden, E target columns (``D``, or ``D / tp`` for a
column shard), 1 and K as in torch's depthwise convolutions (K taps), N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.fast_weights.accumulate import state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.rule import Conv, Normalize, conv_offsets

# Smallest mean square of a source row: keeps all-zero rows zero, far below any real embedding's.
_RMS_FLOOR = 1e-12


def target_from_source(
    source_BTD: Tensor,
    conv_weight_D1K: Tensor | None,
    proj_weight_DE: Tensor | None,
    *,
    plan: ChunkPlan,
    conv: Conv = Conv.learned,
    normalize: Normalize = Normalize.none,
    passes: ConvPasses | None = None,
) -> Tensor:
    """``V = conv(U) @ W_target``, ``[B, T, E]`` in the source's dtype, zero on padding rows.

    Args:
        source_BTD: U, local tokens; may be a strided view.
        conv_weight_D1K: ``[D, 1, K]``; None where ``conv`` has no parameter.
        proj_weight_DE: ``[D, E]``, a column shard or whole; None: identity.
        plan: of the same tokens: chunk and document edges, padding (U is zeroed on it before the
            conv, V after).
        conv: which tokens the taps read; without a weight ``next_token``, or else the identity
            (the reconstruction target).
        normalize: ``key_energy`` takes U at unit root mean square, row by row.
        passes: what runs the convolution; None: this file's plain form.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, length, hidden = source_BTD.shape
    if (plan.batch, plan.length) != (batch, length):
        raise ValueError(
            f"plan is for [{plan.batch}, {plan.length}], source is [{batch}, {length}]"
        )
    if conv_weight_D1K is not None and conv_weight_D1K.shape[:2] != (hidden, 1):
        raise ValueError(f"conv weight {list(conv_weight_D1K.shape)} is not [{hidden}, 1, taps]")
    if proj_weight_DE is not None and proj_weight_DE.shape[0] != hidden:
        raise ValueError(f"projection {list(proj_weight_DE.shape)} does not take {hidden} columns")

    mixed_BTD = _without_padding(source_BTD, plan)
    if normalize is Normalize.key_energy:
        mixed_BTD = _unit_rms(mixed_BTD)
    if conv is Conv.next_token:
        conv_weight_D1K = mixed_BTD.new_ones(hidden, 1, 1)
    if conv_weight_D1K is not None:
        first = conv_offsets(conv, conv_weight_D1K.shape[2]).start
        mixed_BTD = _ChunkedConv.apply(mixed_BTD, conv_weight_D1K, first, plan, passes or PLAIN)
        mixed_BTD = _without_padding(mixed_BTD, plan)
    return mixed_BTD if proj_weight_DE is None else mixed_BTD @ proj_weight_DE


def _without_padding(tokens_BTD: Tensor, plan: ChunkPlan) -> Tensor:
    if plan.padding_BT is None:
        return tokens_BTD
    return tokens_BTD.masked_fill(plan.padding_BT[..., None], 0.0)


def _unit_rms(source_BTD: Tensor) -> Tensor:
    wide_BTD = source_BTD.to(state_dtype(source_BTD.dtype))
    mean_square_BT1 = wide_BTD.square().mean(dim=2, keepdim=True)
    return (wide_BTD * mean_square_BT1.clamp(min=_RMS_FLOOR).rsqrt()).to(source_BTD.dtype)


@dataclass(frozen=True)
class ConvPasses:
    """The passes over the tokens that the convolution and its gradients are made of.

    Attributes:
        sum_of_neighbours: (tokens ``[B, T, D]``, weight ``[D, K]``, plan, ``first=`` offset of the
            first tap, ``direction=`` 1 or -1) to ``out_t = sum_j w_j * u_{t + direction (first +
            j)}`` inside segments, ``[B, T, D]``.
        products_with_neighbours: (left, right ``[B, T, D]``, plan, ``first=``, ``taps=`` K) to the
            sums over tokens of ``left_t * right_{t + first + j}`` inside segments, ``[D, K]``.
    """

    sum_of_neighbours: Callable[..., Tensor]
    products_with_neighbours: Callable[..., Tensor]


class _ChunkedConv(torch.autograd.Function):
    """``out_t = sum_j w_j * u_{t+first+j}`` inside segments (chunk and document); saves U alone.

    Accumulates in the state's dtype. With ``s`` the offset, ``dU`` is the same sum with offsets
    ``-s``, and ``dw_j`` the sum over tokens of ``dout_t * u_{t+s}``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source_BTD: Tensor,
        weight_D1K: Tensor,
        first: int,
        plan: ChunkPlan,
        passes: ConvPasses,
    ) -> Tensor:
        ctx.save_for_backward(source_BTD, weight_D1K)
        ctx.first, ctx.plan, ctx.passes = first, plan, passes
        return passes.sum_of_neighbours(
            source_BTD, weight_D1K[:, 0], plan, first=first, direction=1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTD: Tensor) -> tuple[Tensor | None, ...]:
        passes: ConvPasses = ctx.passes
        source_BTD, weight_D1K = ctx.saved_tensors
        d_source_BTD = d_weight_D1K = None
        if ctx.needs_input_grad[0]:
            d_source_BTD = passes.sum_of_neighbours(
                d_out_BTD, weight_D1K[:, 0], ctx.plan, first=ctx.first, direction=-1
            )
        if ctx.needs_input_grad[1]:
            taps_DK = passes.products_with_neighbours(
                d_out_BTD, source_BTD, ctx.plan, first=ctx.first, taps=weight_D1K.shape[2]
            )
            d_weight_D1K = taps_DK[:, None].to(weight_D1K.dtype)
        return d_source_BTD, d_weight_D1K, None, None, None


def _sum_of_neighbours(
    tokens_BTD: Tensor, weight_DK: Tensor, plan: ChunkPlan, *, first: int, direction: int
) -> Tensor:
    wide = state_dtype(tokens_BTD.dtype)
    offsets = range(first, first + weight_DK.shape[1])
    if 0 in offsets:
        out_BTD = torch.mul(tokens_BTD, weight_DK[:, -first].to(wide))
    else:
        out_BTD = torch.zeros_like(tokens_BTD, dtype=wide)
    for tap, offset in enumerate(offsets):
        if offset == 0 or abs(offset) >= plan.length:
            continue
        here, there = _shifted(direction * offset, plan.length)
        term = tokens_BTD[:, there] * weight_DK[:, tap].to(wide)
        out_BTD[:, here] += term.masked_fill_(_crosses_edge(plan, direction * offset), 0.0)
    return out_BTD.to(tokens_BTD.dtype)


def _products_with_neighbours(
    left_BTD: Tensor, right_BTD: Tensor, plan: ChunkPlan, *, first: int, taps: int
) -> Tensor:
    found = [
        _product_with_neighbour(left_BTD, right_BTD, plan, offset=offset)
        for offset in range(first, first + taps)
    ]
    return torch.stack(found, dim=1)


def _product_with_neighbour(
    left_BTD: Tensor, right_BTD: Tensor, plan: ChunkPlan, *, offset: int
) -> Tensor:
    """``sum over tokens of left_t * right_{t+offset}`` inside segments, ``[D]``."""
    wide = state_dtype(left_BTD.dtype)
    if abs(offset) >= plan.length:
        return left_BTD.new_zeros(left_BTD.shape[2], dtype=wide)
    here, there = _shifted(offset, plan.length)
    product = left_BTD[:, here].to(wide) * right_BTD[:, there]
    if offset != 0:
        product = product.masked_fill_(_crosses_edge(plan, offset), 0.0)
    return product.sum(dim=(0, 1))


def _shifted(offset: int, length: int) -> tuple[slice, slice]:
    """Tokens that have a neighbour at ``offset`` in the row, and those neighbours."""
    here = slice(max(0, -offset), length - max(0, offset))
    return here, slice(here.start + offset, here.stop + offset)


def _crosses_edge(plan: ChunkPlan, offset: int) -> Tensor:
    here, there = _shifted(offset, plan.length)
    return (plan.segments_BT[:, here] != plan.segments_BT[:, there])[..., None]


PLAIN = ConvPasses(_sum_of_neighbours, _products_with_neighbours)
