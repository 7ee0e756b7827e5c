"""The recurrence of In-Place TTT, written as its equations read: the oracle of every test.

For chunk i of a document, rate eta, decay gamma:

    apply    o_t = (W0 + eta * S_i) z_t                    for every token t of the chunk
    update   S_{i+1} = f_i * gamma * S_i + clip(sum_t v_t r_t^T)   S_0 = 0 at every document start

The write key r is z, and the factor f is 1, unless a write rule gives others.

Loops over rows, chunks and tokens in plain torch, differentiated by autograd: slow, short, and
knowing nothing of the code it judges. In-Place TTT (arXiv 2604.06169) section 3; documents, padding
and the absolute chunk grid as README.md states them.

Shape suffixes: B batch rows, T tokens, D hidden, F ffn, E target columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ttt.rule import POWER_ITERATIONS, Clip, ClipMode, Conv, Normalize, conv_offsets


def reference_fast_weight(
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    *,
    eta: float,
    chunk_size: int,
    carry_BDF: Tensor | None = None,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
    decay: float = 1.0,
    clip: Clip | None = None,
    normalize: Normalize = Normalize.none,
    write_keys_BTF: Tensor | None = None,
    factors_BN: Tensor | None = None,
    bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[B, T, D]`` and the state after the last complete chunk ``[B, D, F]``.

    ``bound``: the bounded rule, ``S' = (gamma S + M) B / (B + norm(M))``, M the summary after
    normalisation and clip, ``B = bound * norm(W0) / eta``.
    """
    batch, length, _ = keys_BTF.shape
    all_outputs, all_states = [], []
    for row in range(batch):
        keys, targets = keys_BTF[row], targets_BTD[row]
        write_keys = keys if write_keys_BTF is None else write_keys_BTF[row]
        state = torch.zeros_like(weight_DF) if carry_BDF is None else carry_BDF[row]
        outputs = []
        for first in range(0, length, chunk_size):
            tokens = range(first, min(first + chunk_size, length))
            starts = [t for t in tokens if document_starts is not None and document_starts[row, t]]
            real = [t for t in tokens if padding is None or not padding[row, t]]

            for t in tokens:
                before_any_start = not starts or t < starts[0]
                fast = weight_DF + eta * state if before_any_start else weight_DF
                outputs.append(fast @ keys[t])

            if len(tokens) < chunk_size:
                break  # an unfinished chunk is applied, never written

            last_document = starts[-1] if starts else first
            written = [t for t in real if t >= last_document]
            summary = torch.zeros_like(weight_DF)
            for t in written:
                summary = summary + torch.outer(targets[t], write_keys[t])
            if written and normalize is Normalize.key_energy:
                energy = sum(float(write_keys[t].detach().square().sum()) for t in written)
                summary = summary / (energy / len(written)) if energy > 0 else summary
            if written and normalize is Normalize.spectral:
                norm = _spectral_norm(summary.detach(), write_keys[written].detach().sum(dim=0))
                summary = summary / norm if norm > 0 else summary
            if clip is not None and clip.mode is not ClipMode.off:
                summary = summary * _clip_factor(summary, weight_DF, eta, clip)

            factor = 1.0 if factors_BN is None else float(factors_BN[row, first // chunk_size])
            if bound is not None:
                room = bound * float(weight_DF.detach().norm())
                factor = room / (room + eta * float(summary.detach().norm()))
                summary = factor * summary
            if starts:
                state = summary
            elif not real:
                state = state + summary
            else:
                state = factor * decay * state + summary
        all_outputs.append(torch.stack(outputs))
        all_states.append(state)
    return torch.stack(all_outputs), torch.stack(all_states)


def _spectral_norm(summary: Tensor, start: Tensor) -> float:
    """Return ``norm(M^T y)``, y after power iterations from the sum of the written keys: a number.

    At most M's spectral norm, and near it.
    """
    right = start
    for _ in range(POWER_ITERATIONS):
        left = summary @ right
        if not left.any():
            return 0.0
        left = left / left.norm()
        right = summary.T @ left
    return float(right.norm())


def _clip_factor(summary: Tensor, weight: Tensor, eta: float, clip: Clip) -> float:
    """``min(1, bound / (eta * norm(M)))``: a number, so a constant in the backward."""
    bound = clip.bound
    if clip.mode is ClipMode.relative:
        bound *= float(weight.detach().norm())
    size = eta * float(summary.detach().norm())
    return min(1.0, bound / size) if size > 0 else 1.0


def reference_gate(hidden_BTD: Tensor, weight_D: Tensor, bias_1: Tensor) -> Tensor:
    """``2 sigmoid(w . x_t + b)`` of every token, ``[B, T]``: multiplies the token's target."""
    return torch.stack(
        [
            torch.stack([2 / (1 + torch.exp(-(weight_D @ x) - bias_1[0])) for x in row])
            for row in hidden_BTD
        ]
    )


def reference_target(
    source_BTD: Tensor,
    conv_weight_D1K: Tensor | None,
    proj_weight_DE: Tensor | None,
    *,
    chunk_size: int,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
    conv: Conv = Conv.learned,
    normalize: Normalize = Normalize.none,
) -> Tensor:
    """``v_t = (sum_j w_j * u_{t+s_j}) @ W_target`` over t's chunk and document; s: the taps.

    Learned: ``s = -2 ... 2``; causal: ``-4 ... 0``; next_token: ``s = 1``, ``w = 1``.
    """
    taps: list[tuple[int, Tensor | float]] = [(0, 1.0)]
    if conv is Conv.next_token:
        taps = [(1, 1.0)]
    elif conv_weight_D1K is not None:
        size = conv_weight_D1K.shape[2]
        first = conv_offsets(conv, size).start
        taps = [(first + tap, conv_weight_D1K[:, 0, tap]) for tap in range(size)]
    batch, length, _ = source_BTD.shape
    is_padding = torch.zeros(batch, length, dtype=torch.bool) if padding is None else padding
    starts = torch.zeros_like(is_padding) if document_starts is None else document_starts
    rows = []
    for row in range(batch):
        document = starts[row].long().cumsum(0)
        source = [
            torch.zeros_like(u) if pad else u
            for u, pad in zip(source_BTD[row], is_padding[row], strict=True)
        ]
        if normalize is Normalize.key_energy:
            source = [
                u if pad else u / u.square().mean().sqrt()
                for u, pad in zip(source, is_padding[row], strict=True)
            ]
        targets = []
        for t in range(length):
            if is_padding[row, t]:
                mixed = torch.zeros_like(source[t])
            else:
                mixed = torch.zeros_like(source[t])
                for offset, factor in taps:
                    near = t + offset
                    inside = 0 <= near < length and near // chunk_size == t // chunk_size
                    if inside and document[near] == document[t]:
                        mixed = mixed + factor * source[near]
            targets.append(mixed if proj_weight_DE is None else mixed @ proj_weight_DE)
        rows.append(torch.stack(targets))
    return torch.stack(rows)
