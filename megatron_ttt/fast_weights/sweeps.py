"""Both directions of the fast weight's scan over chunks, and the node of the graph around them.

    S_{i+1} = k_i S_i + L_i^T R_i                  O_i = Z_i (W0 + eta * a*S_i)^T

    G_i = (1/eta) dL/dS_{i+1}
    dZ_i = dO_i W0 + eta * a*(dO_i S_i)     dR_i = eta * w*(L_i G_i)     dL_i = eta * w*(R_i G_i^T)
    G_{i-1} = k_i G_i + (a*dO_i)^T Z_i                              dW0 = sum_i dO_i^T Z_i

L is what is written, R the key it is written under (Z itself unless a write rule says otherwise;
dR then adds to dZ), k the plan's keep, times a factor per row and chunk where the rule gives one.

Derived in README.md. One matrix per chunk is never materialised: the backward recomputes the
states in a forward sweep (dZ) and carries G in a reverse sweep (the rest). With keeps of 0 and 1
only, what leaves G at the document starts adds up to dW0, which then costs no product.

Shape suffixes: B batch rows, T local tokens, D hidden, F ffn (the local shard under TP), N local
chunks, S local spans; X and Y are D and F, or F and D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.fast_weights.accumulate import accumulate_product
from megatron_ttt.fast_weights.exchange import Direction, PendingCarries
from megatron_ttt.fast_weights.groups import Group, groups_of
from megatron_ttt.fast_weights.inside import InsideGradients, InsideScores, inside_backward
from megatron_ttt.fast_weights.labels import Label, labelled
from megatron_ttt.fast_weights.scale import line_norms
from megatron_ttt.fast_weights.scan_call import ScanCall, ScanTensors


class FastWeightScan(torch.autograd.Function):
    """Both sweeps and the exchange between them as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        keys_BTF: Tensor,
        targets_BTD: Tensor,
        write_keys_BTF: Tensor | None,
        weight_DF: Tensor,
        carry_BDF: Tensor | None,
        call: ScanCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with labelled(Label.PRODUCTS):
            return _forward(ctx, keys_BTF, targets_BTD, write_keys_BTF, weight_DF, carry_BDF, call)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_outputs_BTD: Tensor | None, d_state_BDF: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        with labelled(Label.PRODUCTS):
            return _backward(ctx, d_outputs_BTD, d_state_BDF)


def _forward(
    ctx: Any,
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    write_keys_BTF: Tensor | None,
    weight_DF: Tensor,
    carry_BDF: Tensor | None,
    call: ScanCall,
) -> tuple[Tensor, Tensor, Tensor]:
    own_keys = keys_BTF if write_keys_BTF is None else write_keys_BTF
    tensors = ScanTensors(keys_BTF, targets_BTD, own_keys, weight_DF)
    ctx.all_factors_SB = call.shared_factors()
    entering_SBDF = _entering_states(tensors, carry_BDF, call, ctx.all_factors_SB)
    ctx.call = call
    ctx.carry_dtype = None if carry_BDF is None else carry_BDF.dtype
    ctx.set_materialize_grads(False)

    eta = call.eta
    outputs_BTD = _empty_tokens(keys_BTF, weight_DF.shape[0])
    if eta == 0:
        torch.matmul(keys_BTF, weight_DF.T, out=outputs_BTD)
    norms, scores = _StateNorms(tensors, call), []
    sweep = _StateSweep(tensors, entering_SBDF, call)
    for span, groups in enumerate(call.span_groups()):
        sweep.enter(span)
        for group in groups:
            if sweep.live or group.segments:
                norms.note(sweep.state_BDF, group)
            if eta != 0:
                sweep.apply(group, keys_BTF, outputs_BTD, transposed=True)
                scores += tensors.read_inside(group, outputs_BTD, call)
            if group is not groups[-1] or span == call.spans - 1:
                sweep.advance(group)
    ctx.save_for_backward(keys_BTF, targets_BTD, write_keys_BTF, weight_DF, entering_SBDF, *scores)
    squares_BN = norms.squares()
    ctx.mark_non_differentiable(squares_BN)
    return outputs_BTD, sweep.state_BDF, squares_BN


def _backward(
    ctx: Any, d_outputs_BTD: Tensor | None, d_state_BDF: Tensor | None
) -> tuple[Tensor | None, ...]:
    keys_BTF, targets_BTD, write_keys_BTF, weight_DF, entering_SBDF, *scores = ctx.saved_tensors
    own_keys = keys_BTF if write_keys_BTF is None else write_keys_BTF
    tensors = ScanTensors(keys_BTF, targets_BTD, own_keys, weight_DF)
    call: ScanCall = ctx.call
    if d_outputs_BTD is None:
        d_outputs_BTD = _empty_tokens(keys_BTF, weight_DF.shape[0]).zero_()
    needs_keys, needs_targets, needs_write_keys, needs_weight = ctx.needs_input_grad[:4]
    reverse = _GradientSweep(
        tensors,
        d_outputs_BTD,
        d_state_BDF,
        call,
        needs_targets=needs_targets,
        needs_write_keys=needs_keys if write_keys_BTF is None else needs_write_keys,
        needs_weight=needs_weight,
    )
    pending = reverse.start_exchange(ctx.all_factors_SB)

    # Everything up to the wait needs no gradient from another rank: the exchange hides here.
    sweep = _StateSweep(tensors, entering_SBDF, call)
    if call.eta == 0:
        torch.matmul(d_outputs_BTD, weight_DF, out=reverse.d_keys_BTF)
    else:
        for span, groups in enumerate(call.span_groups()):
            sweep.enter(span)
            for group in groups:
                sweep.apply(group, d_outputs_BTD, reverse.d_keys_BTF, transposed=False)
                if group is not groups[-1]:
                    sweep.advance(group)
        reverse.read_inside(iter(scores) if call.scores is InsideScores.KEPT else None)
    del sweep
    d_carry_BDF = reverse.run(pending)
    d_carry = None if ctx.carry_dtype is None else d_carry_BDF.to(ctx.carry_dtype)
    d_write_keys = None if write_keys_BTF is None else reverse.d_write_keys_BTF
    d_weight = reverse.d_weight()
    return reverse.d_keys_BTF, reverse.d_targets_BTD, d_write_keys, d_weight, d_carry, None


class _StateSweep:
    """The live state, moved from the left to the right over the chunks."""

    def __init__(self, tensors: ScanTensors, entering_SBDF: Tensor | None, call: ScanCall) -> None:
        self.tensors, self.entering_SBDF, self.call = tensors, entering_SBDF, call
        self.state_BDF = tensors.zero_state()
        self.effective_BDF = tensors.weight_DF.new_empty(self.state_BDF.shape)
        self.live = False  # whether the state may be other than zero

    def enter(self, span: int) -> None:
        if self.entering_SBDF is not None:
            self.state_BDF.copy_(self.entering_SBDF[span])
            self.live = True

    def apply(
        self, group: Group, inputs_BTX: Tensor, outputs_BTY: Tensor, *, transposed: bool
    ) -> None:
        """Compute ``inputs @ (W0 + eta S)`` or its transpose; fresh rows by ``W0`` alone."""
        blocks, weight_DF = group.blocks, self.tensors.weight_DF
        slow_BDF = weight_DF.expand(self.state_BDF.shape)
        carried_BDF = slow_BDF
        if self.live and blocks.carried:
            eta = self.call.eta
            carried_BDF = self.effective_BDF
            torch.add(weight_DF, self.state_BDF, alpha=eta, out=carried_BDF)
        for matrix_BDF, some in ((carried_BDF, blocks.carried), (slow_BDF, blocks.fresh)):
            matrix_BXY = matrix_BDF.mT if transposed else matrix_BDF
            for rows, tokens in group.places(some):
                torch.bmm(inputs_BTX[rows, tokens], matrix_BXY[rows], out=outputs_BTY[rows, tokens])

    def advance(self, group: Group) -> None:
        """``S = k S + L^T R`` over the group's written rows."""
        self.tensors.write_group(self.state_BDF, group, self.call)
        self.live = self.live or bool(group.blocks.written)


class _StateNorms:
    """Norms of the state that enters every chunk, where they are wanted."""

    def __init__(self, tensors: ScanTensors, call: ScanCall) -> None:
        self.tensors, self.call, plan = tensors, call, call.plan
        chunks = plan.chunks if call.wants_norms else 0
        shape = (plan.batch, chunks, tensors.weight_DF.shape[0])
        self.norms_BND = tensors.weight_DF.new_zeros(shape, dtype=tensors.state_dtype)

    def note(self, state_BDF: Tensor, group: Group) -> None:
        """Take the norm at every chunk of a group that ``state_BDF`` enters."""
        if not self.call.wants_norms:
            return
        line_norms(state_BDF, out=self.norms_BND[:, group.first])
        if group.last > group.first + 1:  # chunk by chunk once more, for the norms alone
            state_BDF = state_BDF.clone()
            (parts,) = groups_of(self.call.plan, chunks=1, spans=1)
            for chunk in range(group.first, group.last - 1):
                self.tensors.write_group(state_BDF, parts[chunk], self.call)
                line_norms(state_BDF, out=self.norms_BND[:, chunk + 1])

    def squares(self) -> Tensor:
        """``[B, N]`` float64; ``[B, 0]`` where none are wanted."""
        return self.norms_BND.double().square().sum(dim=2)


class _GradientSweep:
    """G, moved from the right to the left, and the gradients it leaves behind."""

    def __init__(
        self,
        tensors: ScanTensors,
        d_outputs_BTD: Tensor,
        d_state_BDF: Tensor | None,
        call: ScanCall,
        *,
        needs_targets: bool,
        needs_write_keys: bool,
        needs_weight: bool,
    ) -> None:
        self.tensors, self.d_outputs_BTD, self.call = tensors, d_outputs_BTD, call
        self.needs_targets, self.needs_write_keys = needs_targets, needs_write_keys
        self.needs_weight = needs_weight
        self.d_keys_BTF = torch.empty_like(tensors.keys_BTF)
        self.d_write_keys_BTF = self.d_keys_BTF  # one key that reads and writes: one gradient
        if tensors.write_keys_BTF is not tensors.keys_BTF:
            self.d_write_keys_BTF = torch.zeros_like(tensors.write_keys_BTF)
        self.d_targets_BTD = torch.zeros_like(tensors.targets_BTD)
        self.last_BDF: Tensor | None = None  # G entering the last local span from the state's use
        if d_state_BDF is not None:
            self.last_BDF = d_state_BDF.to(tensors.state_dtype) / call.unit
        # Where G is a plain sum of dO^T Z, its parts add up to dW0 at no cost.
        whole = call.factors_BN is None and not call.plan.decays
        shares = self.last_BDF is None and call.eta != 0 and whole
        self.d_weight_DF = (
            torch.zeros_like(tensors.weight_DF, dtype=tensors.state_dtype)
            if shares and needs_weight
            else None
        )

    def start_exchange(self, factors_SB: Tensor | None) -> PendingCarries | None:
        if self.call.exchange is None:
            return None
        summaries_SBDF = self.tensors.zero_state().repeat(self.call.spans, 1, 1, 1)
        if self.last_BDF is not None:
            summaries_SBDF[-1].copy_(self.last_BDF)
        pending = self.call.exchange.open(
            summaries_SBDF, direction=Direction.REVERSE, factors_SB=factors_SB
        )
        # The scan comes from the right: its spans first, so that their messages leave early. All
        # are computed, also one that nobody waits for, since together they are dW0.
        for span, groups in reversed(list(enumerate(self.call.span_groups()))):
            for group in reversed(groups):
                self._retreat(summaries_SBDF[span], group, self.d_weight_DF)
            pending.provide(span, summaries_SBDF[span])
            if self.d_weight_DF is not None:
                self.d_weight_DF += summaries_SBDF[span].sum(dim=0)
        return pending

    def read_inside(self, scores: Iterator[Tensor] | None) -> None:
        """Add the gradients of what groups read inside; they need no other rank."""
        tensors, call = self.tensors, self.call
        gradients = InsideGradients(
            self.d_keys_BTF,
            self.d_write_keys_BTF if self.needs_write_keys else None,
            self.d_targets_BTD if self.needs_targets else None,
        )
        for group in (group for groups in call.span_groups() for group in groups):
            inside_backward(
                group,
                self.d_outputs_BTD,
                tensors.keys_BTF,
                tensors.write_keys_BTF,
                tensors.targets_BTD,
                gradients,
                chunk_size=call.plan.chunk_size,
                eta=call.eta,
                scores=scores,
            )

    def run(self, pending: PendingCarries | None) -> Tensor:
        """Add the written rows' gradients; return that of the state entering the first span."""
        if pending is not None:
            with labelled(Label.SCAN):
                entering_SBDF = pending.wait()
            shared_DF = None  # the summaries have given dW0 already
            live = True
        else:
            entering_SBDF = self.tensors.zero_state()[None]
            shared_DF = self.d_weight_DF
            live = self.last_BDF is not None
        gradient_BDF = entering_SBDF[0]
        for span, groups in reversed(list(enumerate(self.call.span_groups()))):
            gradient_BDF = entering_SBDF[span]
            if span == self.call.spans - 1 and self.last_BDF is not None:
                gradient_BDF = gradient_BDF + self.last_BDF
            for group in reversed(groups):
                if live:
                    self._read(gradient_BDF, group)
                if group is not groups[0] or span == 0:
                    self._retreat(gradient_BDF, group, shared_DF)
                    live = live or self.call.eta != 0
        if shared_DF is not None:
            shared_DF += gradient_BDF.sum(dim=0)
        return gradient_BDF * self.call.unit

    def d_weight(self) -> Tensor | None:
        if not self.needs_weight:
            return None
        total_DF, tensors = self.d_weight_DF, self.tensors
        if total_DF is None:
            total_DF = torch.zeros_like(tensors.weight_DF, dtype=tensors.state_dtype)
            for row in range(tensors.keys_BTF.shape[0]):
                accumulate_product(
                    total_DF[None], self.d_outputs_BTD[row, None], tensors.keys_BTF[row, None]
                )
        return total_DF.to(tensors.weight_DF.dtype)

    def _read(self, gradient_BDF: Tensor, group: Group) -> None:
        """``dR += eta L G`` and ``dL = eta R G^T`` on the written rows."""
        tensors, unit = self.tensors, self.call.unit
        rounded_BDF = gradient_BDF.to(tensors.keys_BTF.dtype)
        for rows, tokens in group.places(group.blocks.written):
            matrix_BDF = rounded_BDF[rows]
            if self.needs_write_keys:
                self.d_write_keys_BTF[rows, tokens].baddbmm_(
                    tensors.targets_BTD[rows, tokens], matrix_BDF, alpha=unit
                )
            if self.needs_targets:
                self.d_targets_BTD[rows, tokens].baddbmm_(
                    tensors.write_keys_BTF[rows, tokens], matrix_BDF.mT, alpha=unit
                )

    def _retreat(self, gradient_BDF: Tensor, group: Group, shared_DF: Tensor | None) -> None:
        """``G = k G + (a dO)^T Z``; what never reaches G goes to ``shared_DF``, a part of dW0."""
        keys_BTF, blocks = self.tensors.keys_BTF, group.blocks
        if shared_DF is not None:
            for row, keep in enumerate(blocks.keeps):
                if keep == 0:
                    shared_DF += gradient_BDF[row]
        self.call.keep_rows(gradient_BDF, group)
        if self.call.eta == 0:
            return
        for rows, tokens in group.places(blocks.carried):
            accumulate_product(
                gradient_BDF[rows], self.d_outputs_BTD[rows, tokens], keys_BTF[rows, tokens]
            )
        if shared_DF is not None:
            for rows, tokens in group.places(blocks.fresh):
                for row in range(rows.start, rows.stop):
                    accumulate_product(
                        shared_DF[None],
                        self.d_outputs_BTD[row, None, tokens],
                        keys_BTF[row, None, tokens],
                    )


def _entering_states(
    tensors: ScanTensors, carry_BDF: Tensor | None, call: ScanCall, factors_SB: Tensor | None
) -> Tensor | None:
    """Return the state entering each local span, ``[S, B, D, F]``; None where it is zero."""
    carry = None if carry_BDF is None else carry_BDF.to(tensors.state_dtype)
    if call.exchange is None:
        return None if carry is None else carry[None]
    summaries_SBDF = tensors.zero_state().repeat(call.spans, 1, 1, 1)
    if carry is not None:
        summaries_SBDF[0].copy_(carry)
    pending = call.exchange.open(summaries_SBDF, direction=Direction.FORWARD, factors_SB=factors_SB)
    needed = call.exchange.needs_summary(Direction.FORWARD)
    for span, groups in enumerate(call.span_groups()):
        if needed[span]:
            for group in groups:
                tensors.write_group(summaries_SBDF[span], group, call)
            pending.provide(span, summaries_SBDF[span])  # its messages leave while the next is made
    with labelled(Label.SCAN):
        entering_SBDF = pending.wait()
    if carry is not None:
        entering_SBDF[0].add_(carry)
    return entering_SBDF


def _empty_tokens(keys_BTF: Tensor, width: int) -> Tensor:
    """Uninitialised ``[B, T, width]`` in the keys' memory order (Megatron's is tokens first)."""
    batch, length, _ = keys_BTF.shape
    if keys_BTF.stride(1) > keys_BTF.stride(0):
        return keys_BTF.new_empty(length, batch, width).transpose(0, 1)
    return keys_BTF.new_empty(batch, length, width)
