"""What the sweeps work on: the settings of one application of the scan, and its tensors.

Shape suffixes: B batch rows, T local tokens, D hidden, F ffn (the local shard under TP), N local
chunks, S local spans.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import accumulate_product, state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.exchange import CarryExchange
from megatron_ttt.fast_weights.groups import Group, groups_of
from megatron_ttt.fast_weights.inside import InsideScores, read_inside


@dataclass(frozen=True)
class ScanCall:
    """What an application of the scan needs beside differentiable tensors.

    ``factors_BN``: positive, state dtype, constants in the backward: each chunk's keep is the
    plan's times this. 1 where nothing is written. ``None``: all 1.
    """

    plan: ChunkPlan
    eta: float
    spans: int
    exchange: CarryExchange | None
    factors_BN: Tensor | None = None
    group_chunks: int = 1
    scores: InsideScores = InsideScores.REMADE
    wants_norms: bool = False

    @property
    def unit(self) -> float:
        """G is dL/dS divided by this: eta, or 1 where eta is 0 and outputs read no state."""
        return self.eta or 1.0

    def span_groups(self) -> tuple[tuple[Group, ...], ...]:
        """Return the groups of every span, from the left to the right."""
        return groups_of(self.plan, chunks=self.group_chunks, spans=self.spans)

    def keep_rows(self, matrix_BDF: Tensor, group: Group) -> None:
        """Multiply each row's matrix by its keep; 0 selects, so an infinity becomes no NaN."""
        for row, keep in enumerate(group.blocks.keeps):
            if keep == 0:
                matrix_BDF[row].zero_()
            elif self.factors_BN is not None:  # then a group is one chunk
                matrix_BDF[row].mul_(keep * self.factors_BN[row, group.first])
            elif keep != 1:
                matrix_BDF[row].mul_(keep)

    def shared_factors(self) -> Tensor | None:
        """Factors of all spans of the whole row, ``[all spans, B]``; a message to all ranks."""
        if self.exchange is None or self.factors_BN is None:
            return None
        parts_BSN = self.factors_BN.unflatten(1, (self.spans, -1))
        return self.exchange.share_factors(parts_BSN.prod(dim=2).T.contiguous())


@dataclass(frozen=True)
class ScanTensors:
    """The tensors of an application of the scan.

    ``write_keys_BTF`` is ``keys_BTF`` itself (the same object) where writes go under the key that
    reads.
    """

    keys_BTF: Tensor
    targets_BTD: Tensor
    write_keys_BTF: Tensor
    weight_DF: Tensor

    @property
    def state_dtype(self) -> torch.dtype:
        return state_dtype(self.keys_BTF.dtype)

    def zero_state(self) -> Tensor:
        """``[B, D, F]`` zeros in the state's dtype."""
        batch = self.keys_BTF.shape[0]
        return self.weight_DF.new_zeros(batch, *self.weight_DF.shape, dtype=self.state_dtype)

    def write_group(self, state_BDF: Tensor, group: Group, call: ScanCall) -> None:
        """``S = k S + L^T R`` over the group's written rows."""
        call.keep_rows(state_BDF, group)
        for rows, tokens in group.places(group.blocks.written):
            accumulate_product(
                state_BDF[rows], self.targets_BTD[rows, tokens], self.write_keys_BTF[rows, tokens]
            )

    def read_inside(self, group: Group, outputs_BTD: Tensor, call: ScanCall) -> list[Tensor]:
        """Add to the outputs what the group's tokens read from each other; the kept scores."""
        scores = read_inside(
            group,
            outputs_BTD,
            self.keys_BTF,
            self.write_keys_BTF,
            self.targets_BTD,
            chunk_size=call.plan.chunk_size,
            eta=call.eta,
        )
        if call.scores is InsideScores.KEPT:
            return list(scores)
        deque(scores, maxlen=0)
        return []
