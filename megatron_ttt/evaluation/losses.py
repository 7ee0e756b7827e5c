"""Loss of every token of a text, read as in training, summed over positions and ranks.

Shape suffixes: N rows of the text, B rows of a micro-batch, T tokens of a row, R = T + 1, L tokens
of this rank, P bins of positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ttt.config.schema import TTTMode
from megatron_ttt.data.rows import Batch
from megatron_ttt.evaluation.documents import TextRows, batches
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.evaluation.task import Through
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.model.sequence_layout import take_ranges
from megatron_ttt.training.step import ForwardStep


@dataclass(frozen=True)
class Losses:
    """Sums of token losses (nats) and counts of counted tokens, ``[N, P]`` each, fp64, global."""

    total_NP: Tensor
    count_NP: Tensor

    def in_bins(self, bins: int) -> Losses:
        """Return the same in ``bins`` equal stretches of what are positions here."""
        total, count = (
            values.unflatten(1, (bins, -1)).sum(-1) for values in (self.total_NP, self.count_NP)
        )
        return Losses(total, count)

    def last(self, bins: int) -> float:
        """Loss per token over all rows' last ``bins``."""
        return float(self.total_NP[:, -bins:].sum() / self.count_NP[:, -bins:].sum())

    def by_bin(self) -> list[float]:
        """Loss per token in each bin, over all rows."""
        return (self.total_NP.sum(0) / self.count_NP.sum(0)).tolist()

    def mean(self) -> float:
        """Loss per token, over all rows and bins."""
        return float(self.total_NP.sum() / self.count_NP.sum())

    def error_of_difference(self, other: Losses) -> list[float | None]:
        """Return the standard error over rows of the mean difference, per bin: rows are paired.

        ``None`` with one row, which says nothing about others.
        """
        difference_NP = self.total_NP / self.count_NP - other.total_NP / other.count_NP
        rows = len(difference_NP)
        if rows < 2:
            return [None] * difference_NP.shape[1]
        return [float(error) for error in difference_NP.std(dim=0) / math.sqrt(rows)]


def forward_step(subject: Subject, mode: TTTMode) -> ForwardStep:
    """Return what reads micro-batches as training does, with fast weights on or off."""
    config, ranks = subject.config, subject.ranks
    scan = scan_settings(config.parallel, ranks.scan_group)
    return ForwardStep(config, ranks, scan=scan, mode=mode)


@torch.no_grad()
def measure_losses(subject: Subject, text: TextRows, *, mode: TTTMode, batch_size: int) -> Losses:
    """Loss of predicting every token of the rows, in bins of one position.

    Called on every rank; rows are dealt to data-parallel ranks, each row's tokens to context-
    parallel ranks as in training.
    """
    ranks, step = subject.ranks, forward_step(subject, mode)
    rows, length = text.tokens_NR.shape[0], text.tokens_NR.shape[1] - 1
    served = subject.through is Through.transformers
    sums_2NT = torch.zeros(2, rows, length, dtype=torch.float64, device=ranks.device)
    for batch in batches(text, subject=subject, batch_size=batch_size):
        ranges = step.layout(batch).ranges
        counted_BL = take_ranges(batch.loss_mask_BT, ranges).to(ranks.device)
        losses_BL = (
            _served_losses(subject.model, batch, mode)
            if served
            else step(iter([batch]), subject.model)[0]
        )
        found_2BL = torch.stack([losses_BL.double() * counted_BL, counted_BL.double()])
        first = 0
        for start, end in ranges:
            there = slice(first, first + end - start)
            sums_2NT[:, batch.sample_ids_B.to(ranks.device), start:end] = found_2BL[..., there]
            first += end - start
    dist.all_reduce(sums_2NT, group=ranks.groups.dp_cp)
    return Losses(sums_2NT[0].cpu(), sums_2NT[1].cpu())


def _served_losses(model: Any, batch: Batch, mode: TTTMode) -> Tensor:
    """Loss ``[B, T]`` of every token by an exported model's own classes, from logits."""
    if hasattr(model.config, "ttt_mode"):
        model.config.ttt_mode = mode is TTTMode.in_place
    device = model.device
    logits_BTV = model(batch.tokens_BT.to(device), use_cache=False).logits.float()
    return F.cross_entropy(logits_BTV.mT, batch.labels_BT.to(device), reduction="none")
