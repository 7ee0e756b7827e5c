"""What tokens of a group read from chunks of the same group: masked scores, strip by strip.

    A = M o (Z R^T)      B = M o (dO L^T)      M[t, s] = 1 where chunk(s) < chunk(t), else 0

    O += eta A L     dZ += eta B R     dR += eta B^T Z     dL += eta A^T dO

over the tokens of one document (a :class:`~.groups.Segment`): nothing of another document is
multiplied, not even by 0. A strip is a few rows of the triangle, so that its empty half is mostly
skipped and no matrix of all scores exists. Under tensor parallelism scores are partial sums over
the ranks' columns; what they leave adds up in the reductions that outputs and targets have anyway.

Shape suffixes: B batch rows of the segment, T local tokens, R tokens of a strip, W written tokens
that a strip may see, D hidden, F ffn (the local shard under TP).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_ttt.fast_weights.groups import Group, Segment


class InsideScores(Enum):
    """What the backward does for the scores A: half a group's tokens of numbers for every token."""

    KEPT = "kept"  # from the forward
    REMADE = "remade"


def strip_tokens(*, is_cpu: bool) -> int:
    """Tokens of a strip: few on a CPU, which then skips more, many where launches cost."""
    return 64 if is_cpu else 512


@dataclass(frozen=True)
class Strip:
    """Rows ``tokens`` of a segment's triangle and the written tokens that some of them read.

    ``hidden_RW``: true where a written token is not read, for the last columns; None: all are read.
    """

    rows: slice
    tokens: slice
    columns: tuple[slice, ...]
    hidden_RW: Tensor | None

    def scores(self, left_BTX: Tensor, right_BTX: Tensor) -> Tensor:
        """``M o (left right^T)``, ``[B, R, W]``."""
        scores_BRW = torch.bmm(left_BTX[self.rows, self.tokens], self.written(right_BTX).mT)
        if self.hidden_RW is not None:
            scores_BRW[..., -self.hidden_RW.shape[1] :].masked_fill_(self.hidden_RW, 0.0)
        return scores_BRW

    def written(self, tensor_BTX: Tensor) -> Tensor:
        """Return the columns' part of a tensor, ``[B, W, X]``; a view where they are one run."""
        parts = [tensor_BTX[self.rows, run] for run in self.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add_to_written(self, tensor_BTX: Tensor, left: Tensor, right: Tensor, eta: float) -> None:
        """``tensor += eta left^T right`` at the columns."""
        first = 0
        for run in self.columns:
            some = left[..., first : first + run.stop - run.start]
            tensor_BTX[self.rows, run].baddbmm_(some.mT, right, alpha=eta)
            first += run.stop - run.start


def read_inside(
    group: Group,
    outputs_BTD: Tensor,
    keys_BTF: Tensor,
    write_keys_BTF: Tensor,
    targets_BTD: Tensor,
    *,
    chunk_size: int,
    eta: float,
) -> Iterator[Tensor]:
    """Add to the outputs what the group's tokens read from each other; yield the scores A."""
    for strip in _strips(group, chunk_size, keys_BTF.device):
        scores_BRW = strip.scores(keys_BTF, write_keys_BTF)
        outputs_BTD[strip.rows, strip.tokens].baddbmm_(
            scores_BRW, strip.written(targets_BTD), alpha=eta
        )
        yield scores_BRW


@dataclass(frozen=True)
class InsideGradients:
    """Where the gradients of a group's inner reads are added; ``None``: not wanted."""

    keys_BTF: Tensor | None
    write_keys_BTF: Tensor | None
    targets_BTD: Tensor | None


def inside_backward(
    group: Group,
    d_outputs_BTD: Tensor,
    keys_BTF: Tensor,
    write_keys_BTF: Tensor,
    targets_BTD: Tensor,
    gradients: InsideGradients,
    *,
    chunk_size: int,
    eta: float,
    scores: Iterator[Tensor] | None,
) -> None:
    """Add the gradients of :func:`read_inside`.

    ``scores``: what that yielded, group after group; ``None``: they are made once more.
    """
    for strip in _strips(group, chunk_size, keys_BTF.device):
        if gradients.keys_BTF is not None or gradients.write_keys_BTF is not None:
            d_scores_BRW = strip.scores(d_outputs_BTD, targets_BTD)
            if gradients.keys_BTF is not None:
                gradients.keys_BTF[strip.rows, strip.tokens].baddbmm_(
                    d_scores_BRW, strip.written(write_keys_BTF), alpha=eta
                )
            if gradients.write_keys_BTF is not None:
                read_BRF = keys_BTF[strip.rows, strip.tokens]
                strip.add_to_written(gradients.write_keys_BTF, d_scores_BRW, read_BRF, eta)
        if gradients.targets_BTD is not None:
            if scores is None:
                scores_BRW = strip.scores(keys_BTF, write_keys_BTF)
            else:
                scores_BRW = next(scores)
            upstream_BRD = d_outputs_BTD[strip.rows, strip.tokens]
            strip.add_to_written(gradients.targets_BTD, scores_BRW, upstream_BRD, eta)


def _strips(group: Group, chunk_size: int, device: torch.device) -> tuple[Strip, ...]:
    """Return the group's strips, made once for both directions and all layers."""
    if device not in group.strips:
        group.strips[device] = tuple(_make_strips(group, chunk_size, device))
    found: tuple[Strip, ...] = group.strips[device]
    return found


def _make_strips(group: Group, chunk_size: int, device: torch.device) -> Iterator[Strip]:
    size = max(1, strip_tokens(is_cpu=device.type == "cpu") // chunk_size) * chunk_size
    for segment in group.segments:
        first, last = segment.reads
        for start in range(first, last, size):
            stop = min(start + size, last)
            yield _strip(segment, start, stop, chunk_size, device)


def _strip(segment: Segment, start: int, stop: int, chunk_size: int, device: torch.device) -> Strip:
    end = (stop - 1) // chunk_size * chunk_size  # the last row's chunk reads what is before it
    columns = [slice(a, min(b, end)) for a, b in segment.writes if a < end]
    inner = [slice(max(run.start, start), run.stop) for run in columns if run.stop > start]
    hidden_RW = None
    if inner:
        chunk_of_R = torch.arange(stop - start, device=device) // chunk_size
        chunk_of_W = torch.cat([chunk_of_R[run.start - start : run.stop - start] for run in inner])
        hidden_RW = chunk_of_W >= chunk_of_R[:, None]
    return Strip(segment.rows, slice(start, stop), tuple(columns), hidden_RW)
