"""Runs of chunks that touch the state together, and what happens between chunks inside a run.

The state is read and written once a group. Inside one, a token reads what earlier chunks of its
document wrote in the same group from masked scores instead of a state:

    O_t += eta * sum_s [c(s) < c(t)] (z_t . r_s) l_s        s: written, of t's document and group

A group of one chunk has no such part. Everything here is Python integers, made once for a plan and
shared by its layers.

Shape suffixes: B batch rows, T local tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ttt.fast_weights.documents import (
    Block,
    ChunkBlocks,
    ChunkPlan,
    equal_rows,
)

Run = tuple[int, int]  # tokens [start, stop), local


@dataclass(frozen=True)
class Segment:
    """Tokens of one document inside one group, the same in every row of ``rows``.

    Attributes:
        rows: of the batch.
        reads: tokens that read; they begin with a chunk.
        writes: tokens that are written, ascending; several runs where padding lies between.
    """

    rows: slice
    reads: Run
    writes: tuple[Run, ...]


@dataclass(frozen=True)
class Group:
    """Chunks ``[first, last)``, whose tokens begin at local token ``start``.

    ``blocks`` says of the group what :class:`ChunkBlocks` says of a chunk.
    """

    first: int
    last: int
    start: int
    blocks: ChunkBlocks
    segments: tuple[Segment, ...]
    # By device: what ``inside.py`` has made of the segments.
    strips: dict[Any, Any] = field(default_factory=dict, init=False, compare=False)

    def places(self, blocks: Sequence[Block]) -> Iterator[tuple[slice, slice]]:
        """Yield batch rows and local tokens of some of the group's blocks."""
        for block in blocks:
            yield block.rows, slice(self.start + block.start, self.start + block.stop)


# Operations that take as long as moving a byte of the state. CPU: measured with the projection of
# 512 x 1536, 1024 x 3072 and, out of the cache, 2560 x 9728 (tools/benchmark.py chunk-sizes). GPU:
# 720 TFLOP/s and 3 TB/s, of an H100's products and copies by published measurements.
_BALANCE_CPU, _BALANCE_CPU_UNCACHED, _BALANCE_GPU = 10.0, 30.0, 240.0
_CACHE_BYTES = 32 << 20


def group_size(plan: ChunkPlan, *, hidden: int, ffn: int, is_cpu: bool, has_factors: bool) -> int:
    """Chunks of a group. Decay and factors weigh what is read and written: groups of one chunk.

    Args:
        plan: whose chunks are grouped.
        hidden, ffn: of the state; the local shard's under TP, where scores cost more of the whole.
        is_cpu: which kind of device.
        has_factors: whether the write rule has factors.
    """
    if has_factors or plan.decays:
        return 1
    balance = _BALANCE_GPU
    if is_cpu:
        balance = _BALANCE_CPU if 4 * hidden * ffn <= _CACHE_BYTES else _BALANCE_CPU_UNCACHED
    return max(1, group_tokens(hidden, ffn, balance) // plan.chunk_size)


def group_tokens(hidden: int, ffn: int, balance: float) -> int:
    """Return the power of two below the tokens that cost least.

    A group of G tokens passes 17 times over an fp32 state of D x F (68 D F bytes) and computes
    scores of G (4 F + 3 D) operations a token: least where both take equally long,
    ``G^2 = balance * 68 D F / (4 F + 3 D)``.
    """
    best = math.sqrt(balance * 68 * hidden * ffn / (4 * ffn + 3 * hidden))
    return 1 << max(0, math.floor(math.log2(best)))


def groups_of(plan: ChunkPlan, *, chunks: int, spans: int) -> tuple[tuple[Group, ...], ...]:
    """Cut every span into groups of ``chunks`` chunks, the last one perhaps shorter.

    Args:
        plan: of the local tokens; remembers what was made for it.
        chunks: of a group; more than one needs keeps of 0 and 1.
        spans: equal runs of chunks.
    """
    known = plan.groups.get((chunks, spans))
    if known is None:
        size = plan.chunks // spans
        known = tuple(
            tuple(
                _group(plan, first, min(first + chunks, end))
                for first in range(end - size, end, chunks)
            )
            for end in range(size, size * spans + 1, size)
        )
        plan.groups[chunks, spans] = known
    return known


def _group(plan: ChunkPlan, first: int, last: int) -> Group:
    start = first * plan.chunk_size
    if last == first + 1:
        return Group(first, last, start, plan.blocks[first], ())
    stop = plan.tokens_of(last - 1)[1]
    rows = [_Row(plan, row, range(first, last)) for row in range(plan.batch)]
    blocks = ChunkBlocks(
        carried=_blocks([[(start, row.fresh)] for row in rows], start),
        fresh=_blocks([[(row.fresh, stop)] for row in rows], start),
        written=_blocks([row.written for row in rows], start),
        keeps=tuple(row.keep for row in rows),
    )
    segments = [
        Segment(slice(begin, end), reads, writes)
        for begin, end in equal_rows([row.segments for row in rows])
        for reads, writes in rows[begin].segments
    ]
    return Group(first, last, start, blocks, tuple(segments))


def _blocks(runs_B: list[list[Run]], start: int) -> tuple[Block, ...]:
    runs_B = [[(a, b) for a, b in runs if a < b] for runs in runs_B]
    return tuple(
        Block(slice(begin, end), a - start, b - start)
        for begin, end in equal_rows(runs_B)
        for a, b in runs_B[begin]
    )


class _Row:
    """What the chunks of a group do to one batch row.

    Attributes:
        fresh: the first token that does not read the state that enters the group.
        written: runs of tokens that are in the state that leaves it.
        keep: of the state that enters.
        segments: (reads, writes) of its documents.
    """

    def __init__(self, plan: ChunkPlan, row: int, chunks: range) -> None:
        self.segments: list[tuple[Run, tuple[Run, ...]]] = []
        self.written: list[Run] = []
        self.keep = math.prod(plan.blocks[chunk].keeps[row] for chunk in chunks)
        self.fresh = stop = plan.tokens_of(chunks[-1])[1]
        reads: Run | None = None
        for chunk in chunks:
            blocks, begin = plan.blocks[chunk], plan.tokens_of(chunk)[0]
            starts_document = any(_has(block, row) for block in blocks.fresh)
            edge = next((b.stop for b in blocks.carried if _has(b, row)), 0)
            if edge and self.written:
                reads = (begin if reads is None else reads[0], begin + edge)
            if starts_document:
                self.fresh = begin + edge if self.fresh == stop else self.fresh
                self._close(reads)
                reads = None
                if blocks.keeps[row] == 0:  # an unfinished chunk drops nothing
                    self.written = []
            for block in blocks.written:
                if _has(block, row):
                    self._write((begin + block.start, begin + block.stop))
        self._close(reads)

    def _write(self, run: Run) -> None:
        if self.written and self.written[-1][1] == run[0]:
            run = (self.written.pop()[0], run[1])
        self.written.append(run)

    def _close(self, reads: Run | None) -> None:
        if reads is not None:
            self.segments.append((reads, tuple(self.written)))


def _has(block: Block, row: int) -> bool:
    return block.rows.start <= row < block.rows.stop
