"""What each query of a micro-batch sees, as integers: no mask of the sequence squared exists.

A query at place p of its row sees the keys of its own document from ``p - window + 1`` to p.
Queries of one document are one :class:`Stretch`; they meet keys in tiles of three kinds, which
attention kernels compute without looking at a key that nobody sees. Made once for a micro-batch and
shared by its layers.

Shape letters: B batch rows, T tokens of a whole row, Q queries of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.fast_weights.documents import equal_rows

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 64


class Sight(Enum):
    """Which keys of a tile its queries see."""

    ALL = "all"
    CAUSAL = "causal"  # as many keys as queries: those up to the query's own place
    BAND = "band"  # a window of keys that ends at the query's own place


@dataclass(frozen=True)
class Tile:
    """Keys that are met together, at places ``keys`` of the row."""

    keys: slice
    sight: Sight


@dataclass(frozen=True)
class QueryBlock:
    """Queries that meet the same tiles, in every batch row of ``rows``."""

    rows: slice
    queries: slice
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Stretch:
    """Consecutive queries of one document, alike in every batch row of ``rows``.

    Attributes:
        rows: of the batch.
        queries: ``[start, stop)`` among the queries of this rank.
        place: of the first query in its row.
        document: place of the first token of its document.
    """

    rows: slice
    queries: tuple[int, int]
    place: int
    document: int

    def blocks(self, window: int | None) -> Iterator[QueryBlock]:
        """Cut the stretch; with a window into blocks of about that many queries."""
        first, last = self.queries
        whole = last - first
        if window is not None:  # up to here the window begins before the document does
            whole = min(whole, max(0, self.document + window - self.place))
        if whole:
            yield QueryBlock(self.rows, slice(first, first + whole), self._unwindowed(whole))
        if window is None:
            return
        size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, window))
        for start in range(first + whole, last, size):
            stop = min(start + size, last)
            place = self.place + start - first
            seen = slice(place - window + 1, place + stop - start)
            tiles = (Tile(seen, Sight.BAND),)
            yield QueryBlock(self.rows, slice(start, stop), tiles)

    def _unwindowed(self, count: int) -> tuple[Tile, ...]:
        """Return what the first ``count`` queries see of everything before them."""
        end = self.place + count
        if count == 1:
            return (Tile(slice(self.document, end), Sight.ALL),)
        own = Tile(slice(self.place, end), Sight.CAUSAL)
        if self.document == self.place:
            return (own,)
        return (Tile(slice(self.document, self.place), Sight.ALL), own)


@dataclass(frozen=True)
class AttentionPlan:
    """The stretches of a micro-batch on one rank.

    Attributes:
        batch: rows.
        spans: stretches by run of this rank's tokens, in memory order.
    """

    batch: int
    spans: tuple[tuple[Stretch, ...], ...]
    # By window: what was made of them.
    known: dict[Any, Any] = field(default_factory=dict, init=False, compare=False)

    def is_causal(self, queries: int, window: int | None) -> bool:
        """Whether all rows are one document from their first token on: plain causal attention."""
        stretches = [stretch for span in self.spans for stretch in span]
        whole = Stretch(slice(0, self.batch), (0, queries), 0, 0)
        return stretches == [whole] and (window is None or window >= queries)

    def blocks(self, window: int | None) -> tuple[QueryBlock, ...]:
        """Return all blocks of queries, made once."""
        if window not in self.known:
            stretches = (stretch for span in self.spans for stretch in span)
            self.known[window] = tuple(
                block for stretch in stretches for block in stretch.blocks(window)
            )
        found: tuple[QueryBlock, ...] = self.known[window]
        return found

    def band(self, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``[queries, keys]``: 0 where a query of a band sees a key, else minus infinity.

        The first query is at the last key of its window; a block of n queries takes the first n
        rows and ``n + window - 1`` columns.
        """
        place = ("band", window, dtype, device)
        if place not in self.known:
            size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, window))
            ahead = torch.arange(size + window - 1, device=device) - torch.arange(
                size, device=device
            ).unsqueeze(1)
            hidden = (ahead < 0) | (ahead >= window)
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self.known[place] = zeros.masked_fill_(hidden, float("-inf"))
        found: Tensor = self.known[place]
        return found


def plan_attention(
    document_starts: Tensor | None, *, batch: int, ranges: Sequence[tuple[int, int]]
) -> AttentionPlan:
    """Return what the tokens of ``ranges`` see of their rows.

    Args:
        document_starts: ``[B, T]`` bool on the CPU, true on each document's first token; ``None``:
            attention crosses documents.
        batch: rows.
        ranges: this rank's token ranges ``[start, end)`` of a whole row, in memory order.
    """
    starts_B: list[list[int]] = [[0]] * batch
    if document_starts is not None:
        starts_B = [sorted({0, *row.nonzero()[:, 0].tolist()}) for row in document_starts]
    spans, offset = [], 0
    for start, end in ranges:
        shift = offset - start
        spans.append(
            _stretches([list(_documents(starts, start, end, shift)) for starts in starts_B])
        )
        offset += end - start
    return AttentionPlan(batch, tuple(spans))


def plan_reading(
    places: Sequence[int],
    runs: Sequence[tuple[int, int]],
    *,
    ranges: Sequence[tuple[int, int]],
) -> AttentionPlan:
    """Return what the real tokens of a call see of rows that were read before.

    Args:
        places: of each row's first real token of the call.
        runs: the row's real tokens ``[first, last)`` of the call.
        ranges: which tokens of the call are this rank's queries, in memory order.
    """
    spans, offset = [], 0
    for start, end in ranges:
        cuts_B: list[list[_Cut]] = []
        for place, (first, last) in zip(places, runs, strict=True):
            begin, stop = max(first, start), min(last, end)
            cut = (offset + begin - start, offset + stop - start, place + begin - first, 0)
            cuts_B.append([cut] if begin < stop else [])
        spans.append(_stretches(cuts_B))
        offset += end - start
    return AttentionPlan(len(places), tuple(spans))


_Cut = tuple[int, int, int, int]  # first query, last + 1, the first one's place, its document


def _stretches(cuts_B: Sequence[Sequence[_Cut]]) -> tuple[Stretch, ...]:
    return tuple(
        Stretch(slice(first, last), (begin, stop), place, document)
        for first, last in equal_rows(cuts_B)
        for begin, stop, place, document in cuts_B[first]
    )


def _documents(starts: Sequence[int], start: int, end: int, shift: int) -> Iterator[_Cut]:
    """Yield the documents of a range of one row."""
    for document, following in zip(starts, [*starts[1:], end], strict=True):
        begin, stop = max(document, start), min(following, end)
        if begin < stop:
            yield begin + shift, stop + shift, begin, document
