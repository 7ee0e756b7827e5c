"""Where the chunk grid meets the documents: what each chunk reads, writes and keeps.

The grid is absolute: token ``t`` is in chunk ``t // chunk_size``. In a chunk with document starts

- rows before the first start apply the carry, the first start and all after it apply ``W0`` alone;
- the summary sums the real (not padding) rows of the chunk's *last* document;
- the state that enters is dropped (keep 0).

A chunk of padding alone keeps 1 (unless a document starts in it, which always resets); every other
chunk keeps ``decay``. An unfinished last chunk writes nothing and keeps 1.

Everything the hot loops branch on is a Python integer, computed once on the CPU: walking the chunks
never waits for a device.

Shape suffixes: B batch rows, T tokens, N chunks (``ceil(T / C)``), C tokens of a chunk, S spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.fast_weights.upload import upload


@dataclass(frozen=True)
class Block:
    """Tokens ``start <= t < stop`` (counted from the chunk's first) of batch rows ``rows``."""

    rows: slice
    start: int
    stop: int


@dataclass(frozen=True)
class ChunkBlocks:
    """One chunk's tokens, grouped by what is done with them. ``carried`` and ``fresh`` cover it.

    ``carried`` rows apply ``W0 + eta * S``, ``fresh`` rows ``W0`` alone, ``written`` rows enter the
    summary. ``keeps`` holds one factor per batch row.
    """

    carried: tuple[Block, ...]
    fresh: tuple[Block, ...]
    written: tuple[Block, ...]
    keeps: tuple[float, ...]


@dataclass(frozen=True)
class ChunkPlan:
    """What each chunk reads (``a``), writes (``w``) and keeps (``k``), for local tokens in order.

    Tokens are whole rows, or a context-parallel rank's slice of whole chunks (``select_tokens``).
    Tensors live on the device the plan was made for, ``blocks`` in Python.
    """

    chunk_size: int
    reads_carry_BT: Tensor  # bool, a_t: before the first document start of its chunk
    writes_BT: Tensor  # bool, w_t: real, of its chunk's last document, the chunk complete
    keeps_BN: Tensor  # float64, k_i
    segments_BT: Tensor  # int64: equal exactly where two neighbours share chunk and document
    padding_BT: Tensor | None  # bool; None: no padding anywhere
    blocks: tuple[ChunkBlocks, ...]  # one per chunk
    splits_chunks: bool  # some document starts inside a chunk
    # By (chunks of a group, spans): what ``groups.py`` has made of this plan.
    groups: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, compare=False)

    @property
    def batch(self) -> int:
        return self.reads_carry_BT.shape[0]

    @property
    def length(self) -> int:
        return self.reads_carry_BT.shape[1]

    @property
    def chunks(self) -> int:
        return len(self.blocks)

    @property
    def decays(self) -> bool:
        """Whether some chunk keeps a factor other than 0 and 1."""
        return any(keep not in (0.0, 1.0) for chunk in self.blocks for keep in chunk.keeps)

    def tokens_of(self, chunk: int) -> tuple[int, int]:
        """First token of ``chunk`` and the one after its last, in local positions."""
        first = chunk * self.chunk_size
        return first, min(first + self.chunk_size, self.length)

    def places(self, chunk: int, blocks: Sequence[Block]) -> Iterator[tuple[slice, slice]]:
        """Batch rows and local tokens of some of a chunk's blocks, to index ``[B, T, ...]``."""
        first = chunk * self.chunk_size
        for block in blocks:
            yield block.rows, slice(first + block.start, first + block.stop)

    def select_tokens(self, ranges: Sequence[tuple[int, int]]) -> ChunkPlan:
        """Return the plan of the concatenated token ranges ``[start, stop)``, whole chunks each.

        A context-parallel rank calls this on the whole row's plan with the ranges it holds, in
        local memory order. Only the row's own end may cut a chunk, and only in the last range.

        Raises:
            ValueError: a range is empty, outside the row, or not on the chunk grid.
        """
        for place, (start, stop) in enumerate(ranges):
            ends_row = stop == self.length and place == len(ranges) - 1
            if not 0 <= start < stop <= self.length:
                raise ValueError(f"tokens [{start}, {stop}) are not in a row of {self.length}")
            if start % self.chunk_size or (stop % self.chunk_size and not ends_row):
                raise ValueError(
                    f"tokens [{start}, {stop}) are not whole chunks of {self.chunk_size}"
                )
        chunk_ranges = [
            (start // self.chunk_size, -(-stop // self.chunk_size)) for start, stop in ranges
        ]

        def pick(tensor: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
            return torch.cat([tensor[:, start:stop] for start, stop in pairs], dim=1)

        return ChunkPlan(
            chunk_size=self.chunk_size,
            reads_carry_BT=pick(self.reads_carry_BT, ranges),
            writes_BT=pick(self.writes_BT, ranges),
            keeps_BN=pick(self.keeps_BN, chunk_ranges),
            segments_BT=pick(self.segments_BT, ranges),
            padding_BT=None if self.padding_BT is None else pick(self.padding_BT, ranges),
            blocks=tuple(
                chunk for first, last in chunk_ranges for chunk in self.blocks[first:last]
            ),
            splits_chunks=self.splits_chunks,
        )

    def span_keeps(self, spans: int) -> Tensor:
        """Keep of each of ``spans`` equal runs of chunks, a product: ``[S, B]`` float64.

        Raises:
            ValueError: the chunks do not divide into ``spans`` equal runs.
        """
        if self.chunks % spans:
            raise ValueError(f"{self.chunks} chunks do not divide into {spans} equal spans")
        return self.keeps_BN.unflatten(1, (spans, self.chunks // spans)).prod(dim=2).T

    def scale_tokens(self, scale_BN: Tensor) -> Tensor:
        """Repeat a factor per chunk for each of its tokens: ``[B, N]`` to ``[B, T]``."""
        return scale_BN.repeat_interleave(self.chunk_size, dim=1)[:, : self.length]

    def sum_chunks(self, values_BT: Tensor) -> Tensor:
        """Sum per-token values over each chunk: ``[B, T]`` to ``[B, N]``."""
        missing = self.chunks * self.chunk_size - self.length
        padded_BT = torch.nn.functional.pad(values_BT, (0, missing))
        return padded_BT.unflatten(1, (self.chunks, self.chunk_size)).sum(dim=2)


def plan_chunks(
    document_starts_BT: Tensor | None,
    *,
    batch: int,
    length: int,
    chunk_size: int,
    decay: float = 1.0,
    padding_BT: Tensor | None = None,
    device: torch.device | str,
) -> ChunkPlan:
    """Lay the chunk grid over whole rows of ``length`` tokens.

    Args:
        document_starts_BT: bool ``[B, T]``, true on each document's first token; None: no starts
            (a row continues whatever its carry came from). Best on the CPU: it is read there.
        padding_BT: bool ``[B, T]``, true on padding rows; None: no padding.
        decay: ``gamma`` in (0, 1], the keep of an ordinary chunk.
        device: where the plan's tensors go.

    Raises:
        ValueError: sizes below one, a decay outside (0, 1], a mask of another shape or dtype.
    """
    if batch < 1 or length < 1 or chunk_size < 1:
        raise ValueError(
            f"batch {batch}, length {length} and chunk size {chunk_size} must be at least 1"
        )
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay {decay} is not in (0, 1]")
    starts_BT = _checked_mask("document_starts", document_starts_BT, batch, length)
    padding_cpu_BT = _checked_mask("padding", padding_BT, batch, length)

    chunks = -(-length // chunk_size)
    complete = length // chunk_size
    missing = chunks * chunk_size - length
    grid = (chunks, chunk_size)
    starts_BNC = torch.nn.functional.pad(starts_BT, (0, missing)).unflatten(1, grid)
    real_BNC = torch.nn.functional.pad(~padding_cpu_BT, (0, missing)).unflatten(1, grid)

    place_C = torch.arange(chunk_size)
    has_start_BN = starts_BNC.any(dim=2)
    first_BN = torch.where(starts_BNC, place_C, chunk_size).amin(dim=2)
    last_BN = torch.where(starts_BNC, place_C, 0).amax(dim=2)
    is_complete_N = torch.arange(chunks) < complete

    reads_BNC = place_C < first_BN[..., None]
    writes_BNC = (place_C >= last_BN[..., None]) & real_BNC & is_complete_N[:, None]
    keeps_BN = torch.ones(batch, chunks, dtype=torch.float64)
    keeps_BN[real_BNC.any(dim=2)] = decay
    keeps_BN[has_start_BN] = 0.0
    keeps_BN[:, ~is_complete_N] = 1.0

    on_edge_T = torch.arange(length) % chunk_size == 0
    blocks = _group_blocks(first_BN, writes_BNC, keeps_BN, length=length)
    return ChunkPlan(
        chunk_size=chunk_size,
        reads_carry_BT=upload(reads_BNC.flatten(1)[:, :length], device),
        writes_BT=upload(writes_BNC.flatten(1)[:, :length], device),
        keeps_BN=upload(keeps_BN, device),
        segments_BT=upload((starts_BT | on_edge_T).cumsum(dim=1), device),
        padding_BT=upload(padding_cpu_BT, device) if bool(padding_cpu_BT.any()) else None,
        blocks=blocks,
        splits_chunks=bool((starts_BT & ~on_edge_T).any()),
    )


def _checked_mask(name: str, mask_BT: Tensor | None, batch: int, length: int) -> Tensor:
    if mask_BT is None:
        return torch.zeros(batch, length, dtype=torch.bool)
    if mask_BT.dtype != torch.bool or tuple(mask_BT.shape) != (batch, length):
        raise ValueError(
            f"{name} must be bool [{batch}, {length}], got {mask_BT.dtype} {list(mask_BT.shape)}"
        )
    return mask_BT.detach().cpu()


def _group_blocks(
    first_BN: Tensor, writes_BNC: Tensor, keeps_BN: Tensor, *, length: int
) -> tuple[ChunkBlocks, ...]:
    """Turn the masks into slices; neighbouring batch rows with equal slices share one block."""
    batch, chunks, chunk_size = writes_BNC.shape
    first_NB = first_BN.T.tolist()
    keeps_NB = keeps_BN.T.tolist()
    runs_NB = _written_runs(writes_BNC)
    blocks: list[ChunkBlocks] = []
    for chunk in range(chunks):
        size = min(chunk_size, length - chunk * chunk_size)
        edges = [min(first, size) for first in first_NB[chunk]]
        blocks.append(
            ChunkBlocks(
                carried=_merge_rows([[(0, edge)] if edge else [] for edge in edges]),
                fresh=_merge_rows([[(edge, size)] if edge < size else [] for edge in edges]),
                written=_merge_rows([runs_NB.get((row, chunk), []) for row in range(batch)]),
                keeps=tuple(keeps_NB[chunk]),
            )
        )
    return tuple(blocks)


def _written_runs(writes_BNC: Tensor) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return runs of consecutive written tokens for each (batch row, chunk) that has any."""
    step_BNC = torch.nn.functional.pad(writes_BNC.to(torch.int8), (1, 1)).diff(dim=2)
    runs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # nonzero walks in row order, so the i-th rise and the i-th fall bound the i-th run.
    rises = (step_BNC == 1).nonzero().tolist()
    falls = (step_BNC == -1).nonzero().tolist()
    for (row, chunk, start), (_, _, stop) in zip(rises, falls, strict=True):
        runs.setdefault((row, chunk), []).append((start, stop))
    return runs


def _merge_rows(runs_B: list[list[tuple[int, int]]]) -> tuple[Block, ...]:
    return tuple(
        Block(rows=slice(first, last), start=start, stop=stop)
        for first, last in equal_rows(runs_B)
        for start, stop in runs_B[first]
    )


def equal_rows(values_B: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Yield ``(first, last)`` of neighbouring batch rows with equal values."""
    changes = [row for row in range(1, len(values_B)) if values_B[row] != values_B[row - 1]]
    return pairwise([0, *changes, len(values_B)])
