"""How strongly each chunk is written: normalisation, and clipping.

    M_i = V_i^T Z_i / e_i      e_i = mean over the written tokens of |z|^2   (key_energy)
                               e_i = spectral norm of V_i^T Z_i              (spectral)
                               e_i = 1                                       (none)
    clip(M_i) = M_i * min(1, bound / (eta * norm(M_i)))

The spectral norm is that of a few power iterations from the sum of the written keys, through the
tokens' factors; it is at most the exact one. All of it is one factor per batch row and chunk,
folded into the targets, so that the scan never sees it; a constant in the backward.

Shape suffixes: B batch rows, T tokens, N chunks, D hidden, F ffn (the local shard under TP).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import state_dtype, wide_product
from megatron_ttt.fast_weights.documents import Block, ChunkPlan
from megatron_ttt.rule import POWER_ITERATIONS, Clip, ClipMode, Normalize, UpdateRule

ReduceSums = Callable[[Tensor], Tensor]


@torch.no_grad()
def summary_scales(
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    *,
    rule: UpdateRule,
    plan: ChunkPlan,
    reduce_sums: ReduceSums | None,
) -> Tensor | None:
    """Factor of each chunk's summary, ``[B, N]`` in the state's dtype; None if all are 1.

    Args:
        keys_BTF: those under which the targets are written.
        reduce_sums: sums a small tensor over the ranks that share a row's keys (tensor
            parallelism); targets are whole on each of them. None: keys are whole.

    Raises:
        ValueError: a clip whose bound is not positive.
    """
    if rule.normalize is Normalize.none and rule.clip.mode is ClipMode.off:
        return None
    reduce_sums = reduce_sums or (lambda sums: sums)
    scale_BN = torch.ones(
        plan.batch, plan.chunks, dtype=state_dtype(keys_BTF.dtype), device=keys_BTF.device
    )
    if rule.normalize is Normalize.key_energy:
        energy_BN = reduce_sums(_key_energy_sums(keys_BTF, plan))
        count_BN = plan.sum_chunks(plan.writes_BT.to(energy_BN.dtype))
        # Chunks that write nothing, or whose keys are all zero, have nothing to scale.
        scale_BN = torch.where(energy_BN > 0, count_BN / energy_BN, scale_BN)
    elif rule.normalize is Normalize.spectral:
        norm_BN = spectral_norms(keys_BTF, targets_BTD, plan, reduce_sums)
        scale_BN = torch.where(norm_BN > 0, norm_BN.reciprocal(), scale_BN)
    if rule.clip.mode is not ClipMode.off:
        bound = clip_bound(rule.clip, weight_DF, reduce_sums)
        norm_BN = summary_norms(keys_BTF, targets_BTD, plan, reduce_sums) * scale_BN
        scale_BN = scale_BN * (bound / (abs(rule.eta) * norm_BN)).clamp(max=1)
    return scale_BN


def clip_bound(clip: Clip, weight_DF: Tensor, reduce_sums: ReduceSums) -> Tensor | float:
    """Return the bound of ``eta * norm(M)``: a number, or a tensor without dims.

    Raises:
        ValueError: the bound is not positive.
    """
    if not clip.bound > 0:
        raise ValueError(f"clip bound {clip.bound} is not positive")
    if clip.mode is ClipMode.absolute:
        return clip.bound
    return clip.bound * weight_norm(weight_DF, reduce_sums)


def weight_norm(weight_DF: Tensor, reduce_sums: ReduceSums) -> Tensor:
    """``norm(W0)`` in the state's dtype, over all shards."""
    return reduce_sums(squares(weight_DF[None])).sqrt().to(state_dtype(weight_DF.dtype)).squeeze(0)


def squares(matrix_BXY: Tensor) -> Tensor:
    """Squared Frobenius norm of each row's matrix, ``[B]`` float64; no copy in that dtype."""
    return line_norms(matrix_BXY).double().square().sum(dim=1)


def line_norms(matrix_BXY: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Norm of every line ``[B, X]`` in the state's dtype: what a matrix's exact norm is made of.

    Over all elements at once torch adds up in fp32 on a CPU, and the square is 0.3 % too small for
    the 25 million elements of a Qwen3-4B down projection.
    """
    dtype = state_dtype(matrix_BXY.dtype)
    norms_BX: Tensor = torch.linalg.vector_norm(matrix_BXY, dim=2, dtype=dtype, out=out)
    return norms_BX


def update_ratio(state_squares: Tensor, weight_squares: Tensor, *, eta: float) -> Tensor:
    """``norm(eta S) / norm(W0)`` from the squares of whole matrices, of any common shape."""
    return abs(eta) * (state_squares / weight_squares).sqrt()


def summary_norms(
    keys_BTF: Tensor, targets_BTD: Tensor, plan: ChunkPlan, reduce_sums: ReduceSums
) -> Tensor:
    """``norm(V_i^T Z_i)`` of each chunk over all shards, ``[B, N]`` in the state's dtype."""
    return reduce_sums(_summary_squares(keys_BTF, targets_BTD, plan)).clamp(min=0).sqrt()


def spectral_norms(
    keys_BTF: Tensor, targets_BTD: Tensor, plan: ChunkPlan, reduce_sums: ReduceSums
) -> Tensor:
    """Spectral norm of each chunk's ``V_i^T Z_i``, ``[B, N]`` in the state's dtype.

    ``y <- M x / norm(M x)``, ``x <- M^T y`` from ``x = sum z``, and then ``norm(x)``: at most the
    exact norm, near it after :data:`POWER_ITERATIONS`. No summary is formed: ``M x = V^T (Z x)``.
    0 where nothing is written.
    """
    chunk, complete = plan.chunk_size, plan.length // plan.chunk_size
    dtype = state_dtype(keys_BTF.dtype)
    norms_BN = torch.zeros(plan.batch, plan.chunks, dtype=dtype, device=keys_BTF.device)
    if not complete:
        return norms_BN
    tiny = torch.finfo(dtype).tiny
    cut = (complete, chunk)
    written_BT = plan.writes_BT[:, : complete * chunk, None]
    for row in range(plan.batch):
        keys_NCF, targets_NCD = (
            _only(tokens_BTX[row, : complete * chunk], written_BT[row], plan).unflatten(0, cut)
            for tokens_BTX in (keys_BTF, targets_BTD)
        )
        along_NC1 = written_BT[row].unflatten(0, cut).to(dtype)
        for _ in range(POWER_ITERATIONS):
            seen_NC1 = _seen(keys_NCF, along_NC1, reduce_sums)
            left_ND1 = _product(targets_NCD.mT, seen_NC1)
            left_ND1 = left_ND1 / left_ND1.norm(dim=1, keepdim=True).clamp(min=tiny)
            along_NC1 = _product(targets_NCD, left_ND1)
        squares_N = (along_NC1 * _seen(keys_NCF, along_NC1, reduce_sums)).sum(dim=(1, 2))
        norms_BN[row, :complete] = squares_N.clamp(min=0).sqrt()
    return norms_BN


def _only(tokens_TX: Tensor, written_T1: Tensor, plan: ChunkPlan) -> Tensor:
    """Tokens with 0 for those that are not written; no copy where the whole plan is written."""
    if plan.padding_BT is None and not plan.splits_chunks:
        return tokens_TX
    return tokens_TX.masked_fill(~written_T1, 0.0)


def _seen(keys_NCF: Tensor, along_NC1: Tensor, reduce_sums: ReduceSums) -> Tensor:
    """``Z Z^T a`` over all shards of the keys, ``[N, C, 1]``."""
    return reduce_sums(_product(keys_NCF, _product(keys_NCF.mT, along_NC1)))


def _product(tokens: Tensor, vector: Tensor) -> Tensor:
    return wide_product(tokens, vector.to(tokens.dtype))


def scale_chunks(targets_BTD: Tensor, scale_BN: Tensor | None, plan: ChunkPlan) -> Tensor:
    """Targets with their chunks' factors folded in; those that are never written stay.

    Differentiable in the targets alone.
    """
    if scale_BN is None:
        return targets_BTD
    # Only written rows: a factor of one document must not touch (or poison) another's gradient.
    scale_BT = torch.where(plan.writes_BT, plan.scale_tokens(scale_BN), 1.0)
    return (targets_BTD * scale_BT[..., None]).to(targets_BTD.dtype)


def _key_energy_sums(keys_BTF: Tensor, plan: ChunkPlan) -> Tensor:
    dtype = state_dtype(keys_BTF.dtype)
    energy_BT = torch.linalg.vector_norm(keys_BTF, dim=2, dtype=dtype).square()
    return plan.sum_chunks(torch.where(plan.writes_BT, energy_BT, 0.0))


def _summary_squares(keys_BTF: Tensor, targets_BTD: Tensor, plan: ChunkPlan) -> Tensor:
    """``norm(V_i^T Z_i)^2`` of each chunk, ``[B, N]``; forms the summary only if cheaper."""
    hidden, ffn = targets_BTD.shape[2], keys_BTF.shape[2]
    squares_BN = torch.zeros(
        plan.batch, plan.chunks, dtype=state_dtype(keys_BTF.dtype), device=keys_BTF.device
    )
    for chunk, blocks in enumerate(plan.blocks):
        first, _ = plan.tokens_of(chunk)
        for rows, runs in _runs_by_rows(blocks.written):
            keys = _gather(keys_BTF, rows, runs, first)
            targets = _gather(targets_BTD, rows, runs, first)
            if keys.shape[1] * (hidden + ffn) < hidden * ffn:
                product = wide_product(targets, targets.mT).mul_(wide_product(keys, keys.mT))
            else:
                product = wide_product(targets.mT, keys).square_()
            squares_BN[rows, chunk] = product.sum(dim=(1, 2))
    return squares_BN


def _runs_by_rows(written: tuple[Block, ...]) -> list[tuple[slice, list[Block]]]:
    """Blocks of the same batch rows together (padding can cut a chunk's tokens into runs)."""
    groups: list[tuple[slice, list[Block]]] = []
    for block in written:
        if groups and groups[-1][0] == block.rows:
            groups[-1][1].append(block)
        else:
            groups.append((block.rows, [block]))
    return groups


def _gather(tokens_BTX: Tensor, rows: slice, runs: list[Block], first: int) -> Tensor:
    parts = [tokens_BTX[rows, first + run.start : first + run.stop] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
