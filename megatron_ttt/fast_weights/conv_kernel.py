"""The target's convolution as one pass over the tokens, in Triton, for GPUs.

The plain form (``target.py``) is the oracle: it makes a temporary in fp32 for every tap, which is
33 GB of traffic at 32,768 tokens of 2560 where 0.5 GB are read and written. Here a program holds
some tokens and channels, reads each tap's neighbours where they are of the same chunk and document,
and adds up in fp32 (fp64 for fp64).

Under tensor parallelism every rank runs the whole convolution: its share of the channels and a
message that joins the shares would take longer (docs/decisions/convolution-on-every-rank.md).

Only ``model/`` imports this file, and only where triton is installed. Shape suffixes as in
``target.py``.
"""

# Triton reads its kernels' annotations itself.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan

_TOKENS, _CHANNELS = 64, 64  # of one program


def sum_of_neighbours(
    tokens_BTD: Tensor, weight_DK: Tensor, plan: ChunkPlan, *, first: int, direction: int
) -> Tensor:
    """``out_t = sum_j w_j * u_{t + direction (first + j)}`` inside segments, ``[B, T, D]``."""
    tokens_BTD = _channels_together(tokens_BTD)
    out_BTD = torch.empty_like(tokens_BTD)
    batch, length, hidden = tokens_BTD.shape
    _sum_kernel[_grid(batch, length, hidden)](
        tokens_BTD,
        plan.segments_BT.contiguous(),
        weight_DK.contiguous(),
        out_BTD,
        length,
        hidden,
        *_strides(tokens_BTD),
        *_strides(out_BTD),
        first,
        direction,
        weight_DK.shape[1],
        _wide(tokens_BTD),
        _TOKENS,
        _CHANNELS,
    )
    return out_BTD


def products_with_neighbours(
    left_BTD: Tensor, right_BTD: Tensor, plan: ChunkPlan, *, first: int, taps: int
) -> Tensor:
    """``sum over tokens of left_t * right_{t + first + j}`` inside segments, ``[D, K]``."""
    left_BTD, right_BTD = _channels_together(left_BTD), _channels_together(right_BTD)
    batch, length, hidden = left_BTD.shape
    grid = _grid(batch, length, hidden)
    parts = left_BTD.new_empty(grid[0] * batch, taps, hidden, dtype=state_dtype(left_BTD.dtype))
    _product_kernel[grid](
        left_BTD,
        right_BTD,
        plan.segments_BT.contiguous(),
        parts,
        length,
        hidden,
        *_strides(left_BTD),
        *_strides(right_BTD),
        first,
        taps,
        _wide(left_BTD),
        _TOKENS,
        _CHANNELS,
    )
    return parts.sum(dim=0).T


def _grid(batch: int, length: int, hidden: int) -> tuple[int, int, int]:
    return (triton.cdiv(length, _TOKENS), triton.cdiv(hidden, _CHANNELS), batch)


def _channels_together(tensor_BTD: Tensor) -> Tensor:
    return tensor_BTD if tensor_BTD.stride(2) == 1 else tensor_BTD.contiguous()


def _strides(tensor_BTD: Tensor) -> tuple[int, int]:
    return tensor_BTD.stride(0), tensor_BTD.stride(1)


def _wide(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype is torch.float64 else tl.float32


@triton.jit
def _sum_kernel(
    tokens, segments, weight, out, length, hidden, row, token, out_row, out_token,
    first: tl.constexpr, direction: tl.constexpr, taps: tl.constexpr, wide: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # 64 bits: a million tokens of 2560 channels are beyond 32
    here = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    is_token, is_channel = here < length, channel < hidden
    own = tl.load(segments + batch * length + here, mask=is_token, other=-1)
    total = tl.zeros((TOKENS, CHANNELS), dtype=wide)
    for tap in tl.static_range(taps):
        near = here + direction * (first + tap)
        exists = is_token & (near >= 0) & (near < length)
        theirs = tl.load(segments + batch * length + near, mask=exists, other=-2)
        seen = (exists & (theirs == own))[:, None] & is_channel[None, :]
        place = batch * row + near[:, None] * token + channel[None, :]
        value = tl.load(tokens + place, mask=seen, other=0.0).to(wide)
        factor = tl.load(weight + channel * taps + tap, mask=is_channel, other=0.0).to(wide)
        total += value * factor[None, :]
    place = batch * out_row + here[:, None] * out_token + channel[None, :]
    inside = is_token[:, None] & is_channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    left, right, segments, parts, length, hidden,
    left_row, left_token, right_row, right_token,
    first: tl.constexpr, taps: tl.constexpr, wide: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    is_token, is_channel = here < length, channel < hidden
    inside = is_token[:, None] & is_channel[None, :]
    own = tl.load(segments + batch * length + here, mask=is_token, other=-1)
    place = batch * left_row + here[:, None] * left_token + channel[None, :]
    mine = tl.load(left + place, mask=inside, other=0.0).to(wide)
    block = (batch * tl.num_programs(0) + tl.program_id(0)) * taps
    for tap in tl.static_range(taps):
        near = here + first + tap
        exists = is_token & (near >= 0) & (near < length)
        theirs = tl.load(segments + batch * length + near, mask=exists, other=-2)
        seen = (exists & (theirs == own))[:, None] & is_channel[None, :]
        place = batch * right_row + near[:, None] * right_token + channel[None, :]
        value = tl.load(right + place, mask=seen, other=0.0).to(wide)
        # where nothing is seen nothing is multiplied: 0 times an infinity is not 0
        product = tl.where(seen, mine * value, 0.0)
        tl.store(parts + (block + tap) * hidden + channel, tl.sum(product, axis=0), mask=is_channel)
