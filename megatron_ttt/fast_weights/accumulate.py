"""``state += left^T @ right`` into a float32 (or float64) state, by whichever GEMM can do it.

A state is a sum over very many tokens: kept in bfloat16 it would lose small updates, so low
precision operands are multiplied with float32 accumulation straight into the live state.

Shape suffixes: B batch rows, T tokens, D rows and F columns of the product; M, K, N of any.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

# Tokens whose operands are held in float32 at once when nothing multiplies in low precision.
_UPCAST_TOKENS = 1024


class Accumulator(Enum):
    """How a product reaches the state."""

    SAME_DTYPE = "same_dtype"  # operands already have the state's dtype: one plain GEMM
    APEX = "apex"  # fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32
    TRANSFORMER_ENGINE = "transformer_engine"  # general_gemm(accumulate=True) into a float32 output
    TORCH = "torch"  # torch.baddbmm(..., out_dtype=torch.float32), CUDA only
    UPCAST = "upcast"  # operands converted to the state's dtype, a bounded number of tokens at once


def state_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """dtype of states and their gradients: float64 for float64 operands, else float32."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def choose_accumulator(state: Tensor, operand: Tensor) -> Accumulator:
    """Return the one place that decides how ``accumulate_product`` multiplies."""
    if operand.dtype == state.dtype:
        return Accumulator.SAME_DTYPE
    if not operand.is_cpu and state.dtype == torch.float32:
        if _apex_gemm() is not None:
            return Accumulator.APEX
        if _torch_has_wide_output():
            return Accumulator.TORCH
        if _transformer_engine_gemm() is not None:
            return Accumulator.TRANSFORMER_ENGINE
    return Accumulator.UPCAST


def accumulate_product(
    state_BDF: Tensor,
    left_BTD: Tensor,
    right_BTF: Tensor,
    *,
    accumulator: Accumulator | None = None,
) -> None:
    """``state += left^T @ right`` for each batch row, in place.

    Args:
        state_BDF: float32, or float64 with float64 operands; contiguous in its last two dims.
        left_BTD: any strides; same dtype as ``right_BTF``.
        right_BTF: any strides.
        accumulator: for tests; None lets ``choose_accumulator`` decide.
    """
    how = accumulator or choose_accumulator(state_BDF, left_BTD)
    if how is Accumulator.SAME_DTYPE:
        state_BDF.baddbmm_(left_BTD.mT, right_BTF)
    elif how is Accumulator.TORCH:
        torch.baddbmm(state_BDF, left_BTD.mT, right_BTF, out_dtype=state_BDF.dtype, out=state_BDF)
    elif how is Accumulator.UPCAST:
        _accumulate_upcast(state_BDF, left_BTD, right_BTF)
    else:
        gemm = _apex_gemm() if how is Accumulator.APEX else _transformer_engine_gemm()
        assert gemm is not None, f"{how} was asked for but is not installed"
        for row in range(state_BDF.shape[0]):
            gemm(right_BTF[row].contiguous(), left_BTD[row].contiguous(), state_BDF[row])


def wide_product(left_BMK: Tensor, right_BKN: Tensor) -> Tensor:
    """``left @ right`` with the result in the state's dtype (see ``state_dtype``)."""
    dtype = state_dtype(left_BMK.dtype)
    if not left_BMK.is_cpu and left_BMK.dtype != dtype and _torch_has_wide_output():
        return torch.bmm(left_BMK, right_BKN, out_dtype=dtype)
    return torch.bmm(left_BMK.to(dtype), right_BKN.to(dtype))


def _accumulate_upcast(state_BDF: Tensor, left_BTD: Tensor, right_BTF: Tensor) -> None:
    for start in range(0, left_BTD.shape[1], _UPCAST_TOKENS):
        some = slice(start, start + _UPCAST_TOKENS)
        left = left_BTD[:, some].to(state_BDF.dtype)
        right = right_BTF[:, some].to(state_BDF.dtype)
        state_BDF.baddbmm_(left.mT, right)


@cache
def _torch_has_wide_output() -> bool:
    return "dtype_out" in torch.ops.aten.baddbmm.overloads()


@cache
def _apex_gemm() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """``gemm(right_TF, left_TD, state_DF)``: apex names them input, output gradient, main grad."""
    try:
        return import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
    except ImportError:
        return None


@cache
def _transformer_engine_gemm() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    try:
        general_gemm = import_module("transformer_engine.pytorch.cpp_extensions").general_gemm
    except ImportError:
        return None

    def gemm(right_TF: Tensor, left_TD: Tensor, state_DF: Tensor) -> None:
        general_gemm(
            right_TF, left_TD, out_dtype=state_DF.dtype, layout="NT", out=state_DF, accumulate=True
        )

    return gemm
