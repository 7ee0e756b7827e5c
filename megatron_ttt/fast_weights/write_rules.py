"""What a chunk writes: from a layer's tokens to the factors ``L``, ``R`` and ``f`` of the update.

    S_{i+1} = f_i k_i S_i + L_i^T R_i                  O_i = Z_i (W0 + eta * S_i)^T

A write rule is a differentiable function of the tokens' targets V, keys Z and, where it asks for
them, hidden states X; the sweeps over chunks (``sweeps.py``) are the same for every rule. Its
settings, parameters and inputs are declared in ``rule.py``.

    plain      L_t = c V_t                               f = 1
    gated      L_t = c 2 sigmoid(w . x_t + b) V_t        f = 1
    bounded    L_t = c f V_t                             f = B / (B + norm(M))

Here R = Z; c is the chunk's scale (``scale.py``: normalisation, clip), M the chunk's summary with
it, and B = bound * norm(W0) / eta. The gate is 1 at w = b = 0, so a checkpoint's function does not
change when it is added. The bounded state obeys ``norm(S') <= (norm(S) + norm(M)) f <= B`` by the
triangle inequality; f depends on its chunk alone, so the scan over ranks stays associative, and is
near 1, the plain sum, while M is far below B. Scales and f are constants in the backward.

Shape suffixes: B batch rows, T tokens, N chunks, D and H hidden, F ffn (the local shard under TP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.scale import (
    ReduceSums,
    scale_chunks,
    summary_norms,
    summary_scales,
    weight_norm,
)
from megatron_ttt.rule import GATE, GATE_BIAS, UpdateRule, WriteKind


@dataclass(frozen=True)
class TokenInputs:
    """What a layer has of each token. Compute dtype, ``[B, T, ...]``, may be strided views.

    ``keys_BTF``: Z. ``source_BTH``: U, what targets are made of. ``hidden_BTH``: X, the layer's
    normalised input; ``None`` where the rule does not ask for it, or the source is it
    (``rule.reads_hidden_apart``).
    """

    keys_BTF: Tensor
    source_BTH: Tensor
    hidden_BTH: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """X, for rules that ask for it."""
        return self.source_BTH if self.hidden_BTH is None else self.hidden_BTH

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tensors that are there, keys first."""
        held = (self.keys_BTF, self.source_BTH, self.hidden_BTH)
        return (tensor for tensor in held if tensor is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenInputs:
        """Return the inputs with a function of each tensor in its place."""
        hidden_BTH = None if self.hidden_BTH is None else function(self.hidden_BTH)
        return TokenInputs(function(self.keys_BTF), function(self.source_BTH), hidden_BTH)


@dataclass(frozen=True)
class Write:
    """What the tokens write.

    ``targets_BTD``: L, differentiable. ``keys_BTF``: R, differentiable; ``None``: Z itself.
    ``factors_BN``: f, positive, state dtype, 1 for chunks that write nothing; a constant in the
    backward; ``None``: all 1.
    """

    targets_BTD: Tensor
    keys_BTF: Tensor | None = None
    factors_BN: Tensor | None = None

    def select(self, plan: ChunkPlan, chunks: range) -> Write:
        """Return what the tokens of neighbouring chunks write. ``plan``: of all the tokens."""
        first, last = plan.tokens_of(chunks[0])[0], plan.tokens_of(chunks[-1])[1]
        return Write(
            self.targets_BTD[:, first:last],
            None if self.keys_BTF is None else self.keys_BTF[:, first:last],
            None if self.factors_BN is None else self.factors_BN[:, chunks[0] : chunks[-1] + 1],
        )


@dataclass(frozen=True)
class WriteCall:
    """What a write rule needs beside the tokens.

    ``weight_DF``: W0. ``parameters``: the rule's own, by their names in ``rule.py``, whole.
    ``reduce_sums``: sums small tensors over the ranks that share the rows' keys; ``None``: keys are
    whole.
    """

    rule: UpdateRule
    plan: ChunkPlan
    weight_DF: Tensor
    parameters: Mapping[str, Tensor | None]
    reduce_sums: ReduceSums | None = None

    def scales(self, targets_BTD: Tensor, keys_BTF: Tensor) -> Tensor | None:
        """Factor of each chunk by normalisation and clip, ``[B, N]``; ``None``: all 1."""
        return summary_scales(
            keys_BTF,
            targets_BTD,
            self.weight_DF,
            rule=self.rule,
            plan=self.plan,
            reduce_sums=self.reduce_sums,
        )

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the rule's own."""
        value = self.parameters[name]
        assert value is not None, name
        return value


def plain(inputs: TokenInputs, targets_BTD: Tensor, call: WriteCall) -> Write:
    """``L = c V``."""
    scale_BN = call.scales(targets_BTD, inputs.keys_BTF)
    return Write(scale_chunks(targets_BTD, scale_BN, call.plan))


def gated(inputs: TokenInputs, targets_BTD: Tensor, call: WriteCall) -> Write:
    """``L_t = c 2 sigmoid(w . x_t + b) V_t``."""
    wide = state_dtype(targets_BTD.dtype)
    logits_BT = inputs.hidden.to(wide) @ call.parameter(GATE).to(wide)
    gate_BT = 2 * torch.sigmoid(logits_BT + call.parameter(GATE_BIAS).to(wide))
    return plain(inputs, targets_BTD * gate_BT[..., None].to(targets_BTD.dtype), call)


def bounded(inputs: TokenInputs, targets_BTD: Tensor, call: WriteCall) -> Write:
    """``L = c f V`` with ``f = B / (B + norm(M))``: ``norm(eta S) <= bound norm(W0)``."""
    with torch.no_grad():
        reduce_sums = call.reduce_sums or (lambda sums: sums)
        norm_BN = summary_norms(inputs.keys_BTF, targets_BTD, call.plan, reduce_sums)
        scale_BN = call.scales(targets_BTD, inputs.keys_BTF)
        if scale_BN is not None:
            norm_BN = norm_BN * scale_BN
        room = call.rule.write.bound * weight_norm(call.weight_DF, reduce_sums)
        room = room.clamp(min=torch.finfo(room.dtype).tiny)  # W0 = 0 has no room, and no 0 / 0
        factors_BN = room / (room + abs(call.rule.eta) * norm_BN)
        scale_BN = factors_BN if scale_BN is None else factors_BN * scale_BN
    return Write(scale_chunks(targets_BTD, scale_BN, call.plan), factors_BN=factors_BN)


WriteRule = Callable[[TokenInputs, Tensor, WriteCall], Write]

WRITE_RULES: dict[WriteKind, WriteRule] = {
    WriteKind.plain: plain,
    WriteKind.gated: gated,
    WriteKind.bounded: bounded,
}


def write(inputs: TokenInputs, targets_BTD: Tensor, call: WriteCall) -> Write:
    """Return what tokens with targets V ``[B, T, D]`` write under the rule of ``call``."""
    return WRITE_RULES[call.rule.write.kind](inputs, targets_BTD, call)
