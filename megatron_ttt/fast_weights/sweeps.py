"""Both directions of the fast weight's scan over chunks, and the node of the graph around them.

    S_{i+1} = k_i S_i + V_i^T Z_i                  O_i = Z_i (W0 + eta * a*S_i)^T

    G_i = (1/eta) dL/dS_{i+1}
    dZ_i = dO_i W0 + eta * a*(dO_i S_i) + eta * w*(V_i G_i)        dV_i = eta * w*(Z_i G_i^T)
    G_{i-1} = k_i G_i + (a*dO_i)^T Z_i                              dW0 = sum_i dO_i^T Z_i

Derived in README.md. Never is one matrix per chunk held: the backward recomputes the states in a
forward sweep (first two terms of dZ) and carries G in a reverse sweep (the rest). With keeps of 0
and 1 only, what leaves G at the document starts adds up to dW0, which then costs no product.

Shape suffixes: B batch rows, T local tokens, D hidden, F ffn (the local shard under TP), N local
chunks, S local spans; X and Y are D and F, or F and D.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.fast_weights.accumulate import accumulate_product, state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan


class Direction(Enum):
    """Which way a scan over spans runs: states go right, their gradients left."""

    FORWARD = "forward"
    REVERSE = "reverse"


class PendingCarries(Protocol):
    """A scan under way."""

    def provide(self, span: int, summary_BDF: Tensor) -> None:
        """Hand in the summary of local span ``span`` as soon as it exists; not written again."""
        ...

    def wait(self) -> Tensor:
        """``[S, B, D, F]``: what enters each local span, in local order; the caller may write."""
        ...


class CarryExchange(Protocol):
    """Combines span summaries across ranks; it knows every span's keep and where spans lie."""

    def needs_summary(self, direction: Direction) -> list[bool]:
        """By local span: whether the scan reads its summary (nobody needs the row's last)."""
        ...

    def open(self, like_SBDF: Tensor, *, direction: Direction) -> PendingCarries:
        """Begin an exclusive scan over the whole row's spans, before their summaries exist.

        ``like_SBDF`` gives shape, dtype and device.

        FORWARD: from the left, ``c_{s+1} = k_s c_s + summary_s``, zero into the first span.
        REVERSE: from the right with the same keeps, ``c_{s-1} = k_s c_s + summary_s``, zero into
        the last span. A keep of 0 selects, it does not multiply.
        """
        ...


@dataclass(frozen=True)
class ScanCall:
    """What an application of the scan needs beside tensors."""

    plan: ChunkPlan
    learning_rate: float
    spans: int
    exchange: CarryExchange | None

    @property
    def unit(self) -> float:
        """G is dL/dS divided by this: eta, or 1 where eta is 0 and outputs read no state."""
        return self.learning_rate or 1.0

    def span_chunks(self) -> list[range]:
        size = self.plan.chunks // self.spans
        return [range(span * size, (span + 1) * size) for span in range(self.spans)]


class FastWeightScan(torch.autograd.Function):
    """Both sweeps and the exchange between them as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        keys_BTF: Tensor,
        targets_BTD: Tensor,
        weight_DF: Tensor,
        carry_BDF: Tensor | None,
        call: ScanCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        entering_SBDF = _entering_states(keys_BTF, targets_BTD, weight_DF, carry_BDF, call)
        ctx.call = call
        ctx.carry_dtype = None if carry_BDF is None else carry_BDF.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(keys_BTF, targets_BTD, weight_DF, entering_SBDF)

        plan, eta = call.plan, call.learning_rate
        outputs_BTD = _empty_tokens(keys_BTF, weight_DF.shape[0])
        if eta == 0:
            torch.matmul(keys_BTF, weight_DF.T, out=outputs_BTD)
        squares_BN = plan.keeps_BN.new_zeros(
            plan.batch, plan.chunks, dtype=state_dtype(keys_BTF.dtype)
        )
        sweep = _StateSweep(keys_BTF, targets_BTD, weight_DF, entering_SBDF, call)
        for span, chunks in enumerate(call.span_chunks()):
            sweep.enter(span)
            for chunk in chunks:
                if sweep.live:
                    norm_B = torch.linalg.vector_norm(sweep.state_BDF.flatten(1), dim=1)
                    squares_BN[:, chunk] = norm_B.square()
                if eta != 0:
                    sweep.apply(chunk, keys_BTF, outputs_BTD, transposed=True)
                if chunk != chunks[-1] or span == call.spans - 1:
                    sweep.advance(chunk)
        ctx.mark_non_differentiable(squares_BN)
        return outputs_BTD, sweep.state_BDF, squares_BN

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_outputs_BTD: Tensor | None, d_state_BDF: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        keys_BTF, targets_BTD, weight_DF, entering_SBDF = ctx.saved_tensors
        call: ScanCall = ctx.call
        if d_outputs_BTD is None:
            d_outputs_BTD = _empty_tokens(keys_BTF, weight_DF.shape[0]).zero_()
        reverse = _GradientSweep(
            keys_BTF, targets_BTD, weight_DF, d_outputs_BTD, d_state_BDF, call, ctx.needs_input_grad
        )
        pending = reverse.start_exchange()

        # Everything up to the wait needs no gradient from another rank: the exchange hides here.
        sweep = _StateSweep(keys_BTF, targets_BTD, weight_DF, entering_SBDF, call)
        if call.learning_rate == 0:
            torch.matmul(d_outputs_BTD, weight_DF, out=reverse.d_keys_BTF)
        else:
            for span, chunks in enumerate(call.span_chunks()):
                sweep.enter(span)
                for chunk in chunks:
                    sweep.apply(chunk, d_outputs_BTD, reverse.d_keys_BTF, transposed=False)
                    if chunk != chunks[-1]:
                        sweep.advance(chunk)
        del sweep
        d_carry_BDF = reverse.run(pending)
        d_carry = None if ctx.carry_dtype is None else d_carry_BDF.to(ctx.carry_dtype)
        return reverse.d_keys_BTF, reverse.d_targets_BTD, reverse.d_weight(), d_carry, None


class _StateSweep:
    """The live state, moved from the left to the right over the chunks."""

    def __init__(
        self,
        keys_BTF: Tensor,
        targets_BTD: Tensor,
        weight_DF: Tensor,
        entering_SBDF: Tensor | None,
        call: ScanCall,
    ) -> None:
        self.keys_BTF, self.targets_BTD, self.weight_DF = keys_BTF, targets_BTD, weight_DF
        self.entering_SBDF, self.call = entering_SBDF, call
        self.state_BDF = _zero_state(keys_BTF, weight_DF)
        self.effective_BDF = weight_DF.new_empty(self.state_BDF.shape)
        self.live = False  # whether the state may be other than zero

    def enter(self, span: int) -> None:
        if self.entering_SBDF is not None:
            self.state_BDF.copy_(self.entering_SBDF[span])
            self.live = True

    def apply(
        self, chunk: int, inputs_BTX: Tensor, outputs_BTY: Tensor, *, transposed: bool
    ) -> None:
        """``outputs = inputs @ (W0 + eta S)`` or its transpose; fresh rows by ``W0`` alone."""
        blocks = self.call.plan.blocks[chunk]
        first, _ = self.call.plan.tokens_of(chunk)
        slow_BDF = self.weight_DF.expand(self.state_BDF.shape)
        carried_BDF = slow_BDF
        if self.live and blocks.carried:
            eta = self.call.learning_rate
            carried_BDF = self.effective_BDF
            torch.add(self.weight_DF, self.state_BDF, alpha=eta, out=carried_BDF)
        for matrix_BDF, group in ((carried_BDF, blocks.carried), (slow_BDF, blocks.fresh)):
            matrix_BXY = matrix_BDF.mT if transposed else matrix_BDF
            for block in group:
                rows, tokens = block.rows, slice(first + block.start, first + block.stop)
                torch.bmm(inputs_BTX[rows, tokens], matrix_BXY[rows], out=outputs_BTY[rows, tokens])

    def advance(self, chunk: int) -> None:
        """``S = k S + V^T Z`` over the chunk's written rows."""
        _write_chunk(self.state_BDF, self.keys_BTF, self.targets_BTD, self.call.plan, chunk)
        self.live = self.live or bool(self.call.plan.blocks[chunk].written)


class _GradientSweep:
    """G, moved from the right to the left, and the gradients it leaves behind."""

    def __init__(
        self,
        keys_BTF: Tensor,
        targets_BTD: Tensor,
        weight_DF: Tensor,
        d_outputs_BTD: Tensor,
        d_state_BDF: Tensor | None,
        call: ScanCall,
        needs_input_grad: tuple[bool, ...],
    ) -> None:
        self.keys_BTF, self.targets_BTD, self.weight_DF = keys_BTF, targets_BTD, weight_DF
        self.d_outputs_BTD, self.call = d_outputs_BTD, call
        self.needs_targets, self.needs_weight = needs_input_grad[1:3]
        self.d_keys_BTF = torch.empty_like(keys_BTF)
        self.d_targets_BTD = torch.zeros_like(targets_BTD)
        self.last_BDF: Tensor | None = None  # G entering the last local span from the state's use
        if d_state_BDF is not None:
            self.last_BDF = d_state_BDF.to(state_dtype(keys_BTF.dtype)) / call.unit
        # Where G is a plain sum of dO^T Z, its parts add up to dW0 at no cost.
        shares = self.last_BDF is None and call.learning_rate != 0 and not call.plan.decays
        self.d_weight_DF = (
            torch.zeros_like(weight_DF, dtype=state_dtype(keys_BTF.dtype))
            if shares and self.needs_weight
            else None
        )

    def start_exchange(self) -> PendingCarries | None:
        if self.call.exchange is None:
            return None
        zero_BDF = _zero_state(self.keys_BTF, self.weight_DF)
        summaries_SBDF = zero_BDF.repeat(self.call.spans, 1, 1, 1)
        if self.last_BDF is not None:
            summaries_SBDF[-1].copy_(self.last_BDF)
        pending = self.call.exchange.open(summaries_SBDF, direction=Direction.REVERSE)
        # The scan comes from the right: its spans first, so that their messages leave early. All
        # are computed, also one that nobody waits for, since together they are dW0.
        for span, chunks in reversed(list(enumerate(self.call.span_chunks()))):
            for chunk in reversed(chunks):
                self._retreat(summaries_SBDF[span], chunk, self.d_weight_DF)
            pending.provide(span, summaries_SBDF[span])
            if self.d_weight_DF is not None:
                self.d_weight_DF += summaries_SBDF[span].sum(dim=0)
        return pending

    def run(self, pending: PendingCarries | None) -> Tensor:
        """Add the written rows' gradients; return that of the state entering the first span."""
        if pending is not None:
            entering_SBDF = pending.wait()
            shared_DF = None  # the summaries have given dW0 already
            live = True
        else:
            entering_SBDF = _zero_state(self.keys_BTF, self.weight_DF)[None]
            shared_DF = self.d_weight_DF
            live = self.last_BDF is not None
        gradient_BDF = entering_SBDF[0]
        for span, chunks in reversed(list(enumerate(self.call.span_chunks()))):
            gradient_BDF = entering_SBDF[span]
            if span == self.call.spans - 1 and self.last_BDF is not None:
                gradient_BDF = gradient_BDF + self.last_BDF
            for chunk in reversed(chunks):
                if live:
                    self._read(gradient_BDF, chunk)
                if chunk != chunks[0] or span == 0:
                    self._retreat(gradient_BDF, chunk, shared_DF)
                    live = live or self.call.learning_rate != 0
        if shared_DF is not None:
            shared_DF += gradient_BDF.sum(dim=0)
        return gradient_BDF * self.call.unit

    def d_weight(self) -> Tensor | None:
        if not self.needs_weight:
            return None
        total_DF = self.d_weight_DF
        if total_DF is None:
            total_DF = torch.zeros_like(self.weight_DF, dtype=state_dtype(self.keys_BTF.dtype))
            for row in range(self.keys_BTF.shape[0]):
                accumulate_product(
                    total_DF[None], self.d_outputs_BTD[row, None], self.keys_BTF[row, None]
                )
        return total_DF.to(self.weight_DF.dtype)

    def _read(self, gradient_BDF: Tensor, chunk: int) -> None:
        """``dZ += eta V G`` and ``dV = eta Z G^T`` on the written rows."""
        rounded_BDF = gradient_BDF.to(self.keys_BTF.dtype)
        first, _ = self.call.plan.tokens_of(chunk)
        unit = self.call.unit
        for block in self.call.plan.blocks[chunk].written:
            rows, tokens = block.rows, slice(first + block.start, first + block.stop)
            matrix_BDF = rounded_BDF[rows]
            self.d_keys_BTF[rows, tokens].baddbmm_(
                self.targets_BTD[rows, tokens], matrix_BDF, alpha=unit
            )
            if self.needs_targets:
                self.d_targets_BTD[rows, tokens].baddbmm_(
                    self.keys_BTF[rows, tokens], matrix_BDF.mT, beta=0, alpha=unit
                )

    def _retreat(self, gradient_BDF: Tensor, chunk: int, shared_DF: Tensor | None) -> None:
        """``G = k G + (a dO)^T Z``; what never reaches G goes to ``shared_DF``, a part of dW0."""
        plan = self.call.plan
        blocks = plan.blocks[chunk]
        first, _ = plan.tokens_of(chunk)
        if shared_DF is not None:
            for row, keep in enumerate(blocks.keeps):
                if keep == 0:
                    shared_DF += gradient_BDF[row]
        _keep_rows(gradient_BDF, blocks.keeps)
        if self.call.learning_rate == 0:
            return
        for block in blocks.carried:
            rows, tokens = block.rows, slice(first + block.start, first + block.stop)
            accumulate_product(
                gradient_BDF[rows], self.d_outputs_BTD[rows, tokens], self.keys_BTF[rows, tokens]
            )
        if shared_DF is not None:
            for block in blocks.fresh:
                tokens = slice(first + block.start, first + block.stop)
                for row in range(block.rows.start, block.rows.stop):
                    accumulate_product(
                        shared_DF[None],
                        self.d_outputs_BTD[row, None, tokens],
                        self.keys_BTF[row, None, tokens],
                    )


def _entering_states(
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    carry_BDF: Tensor | None,
    call: ScanCall,
) -> Tensor | None:
    """The state entering each local span, ``[S, B, D, F]``; None where it is zero."""
    carry = None if carry_BDF is None else carry_BDF.to(state_dtype(keys_BTF.dtype))
    if call.exchange is None:
        return None if carry is None else carry[None]
    summaries_SBDF = _zero_state(keys_BTF, weight_DF).repeat(call.spans, 1, 1, 1)
    if carry is not None:
        summaries_SBDF[0].copy_(carry)
    pending = call.exchange.open(summaries_SBDF, direction=Direction.FORWARD)
    needed = call.exchange.needs_summary(Direction.FORWARD)
    for span, chunks in enumerate(call.span_chunks()):
        if needed[span]:
            for chunk in chunks:
                _write_chunk(summaries_SBDF[span], keys_BTF, targets_BTD, call.plan, chunk)
            pending.provide(span, summaries_SBDF[span])  # its messages leave while the next is made
    entering_SBDF = pending.wait()
    if carry is not None:
        entering_SBDF[0].add_(carry)
    return entering_SBDF


def _write_chunk(
    state_BDF: Tensor, keys_BTF: Tensor, targets_BTD: Tensor, plan: ChunkPlan, chunk: int
) -> None:
    blocks = plan.blocks[chunk]
    first, _ = plan.tokens_of(chunk)
    _keep_rows(state_BDF, blocks.keeps)
    for block in blocks.written:
        rows, tokens = block.rows, slice(first + block.start, first + block.stop)
        accumulate_product(state_BDF[rows], targets_BTD[rows, tokens], keys_BTF[rows, tokens])


def _keep_rows(matrix_BDF: Tensor, keeps: tuple[float, ...]) -> None:
    """Multiply each row's matrix by its keep; 0 selects, so an infinity does not become a NaN."""
    for row, keep in enumerate(keeps):
        if keep == 0:
            matrix_BDF[row].zero_()
        elif keep != 1:
            matrix_BDF[row].mul_(keep)


def _zero_state(keys_BTF: Tensor, weight_DF: Tensor) -> Tensor:
    return weight_DF.new_zeros(
        keys_BTF.shape[0], *weight_DF.shape, dtype=state_dtype(keys_BTF.dtype)
    )


def _empty_tokens(keys_BTF: Tensor, width: int) -> Tensor:
    """Uninitialised ``[B, T, width]`` in the keys' memory order (Megatron's is tokens first)."""
    batch, length, _ = keys_BTF.shape
    if keys_BTF.stride(1) > keys_BTF.stride(0):
        return keys_BTF.new_empty(length, batch, width).transpose(0, 1)
    return keys_BTF.new_empty(batch, length, width)
