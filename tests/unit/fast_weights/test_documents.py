"""The chunk plan, spelled out in small rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.documents import Block


def row_mask(length: int, *places: int) -> Tensor:
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, list(places)] = True
    return mask


def plan_row(length: int, *, starts: tuple[int, ...] = (), pads: tuple[int, ...] = ()) -> ChunkPlan:
    return plan_chunks(
        row_mask(length, *starts) if starts else None,
        batch=1,
        length=length,
        chunk_size=4,
        decay=0.5,
        padding_BT=row_mask(length, *pads) if pads else None,
        device="cpu",
    )


def places(mask_BT: Tensor) -> list[int]:
    return mask_BT[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("starts", "pads", "reads", "writes", "keeps"),
    [
        ((), (), range(10), range(8), [0.5, 0.5, 1]),
        ((0,), (), range(4, 10), range(8), [0, 0.5, 1]),
        ((4,), (), [*range(4), 8, 9], range(8), [0.5, 0, 1]),
        ((5, 6), (), [*range(5), 8, 9], [*range(4), 6, 7], [0.5, 0, 1]),
        ((9,), (), range(9), range(8), [0.5, 0.5, 1]),
        ((), (0, 1), range(10), range(2, 8), [0.5, 0.5, 1]),
        ((), (0, 1, 2, 3), range(10), range(4, 8), [1, 0.5, 1]),
        ((), (5, 7), range(10), [0, 1, 2, 3, 4, 6], [0.5, 0.5, 1]),
        ((2,), (0, 1, 2, 3), [0, 1, *range(4, 10)], range(4, 8), [0, 0.5, 1]),
    ],
    ids=[
        "no documents",
        "start of the row",
        "on a chunk edge",
        "two starts in a chunk",
        "in the unfinished chunk",
        "padding on the left",
        "a chunk of padding",
        "padding inside",
        "a start on padding resets",
    ],
)
def test_one_row(
    starts: tuple[int, ...],
    pads: tuple[int, ...],
    reads: list[int],
    writes: list[int],
    keeps: list[float],
) -> None:
    plan = plan_row(10, starts=starts, pads=pads)
    assert places(plan.reads_carry_BT) == list(reads)
    assert places(plan.writes_BT) == list(writes)
    assert plan.keeps_BN.tolist() == [keeps]
    assert [list(chunk.keeps) for chunk in plan.blocks] == [[keep] for keep in keeps]


def tokens_in(blocks: tuple[Block, ...], first: int, batch: int) -> Tensor:
    count = torch.zeros(batch, 40, dtype=torch.long)
    for block in blocks:
        count[block.rows, first + block.start : first + block.stop] += 1
    return count


def test_blocks_say_what_the_masks_say() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(5, 33, generator=generator) < 0.1
    pads = torch.rand(5, 33, generator=generator) < 0.2
    plan = plan_chunks(
        starts, batch=5, length=33, chunk_size=4, padding_BT=pads, device="cpu", decay=0.9
    )
    carried = sum(tokens_in(c.carried, 4 * n, 5) for n, c in enumerate(plan.blocks))
    fresh = sum(tokens_in(c.fresh, 4 * n, 5) for n, c in enumerate(plan.blocks))
    written = sum(tokens_in(c.written, 4 * n, 5) for n, c in enumerate(plan.blocks))
    assert torch.equal(carried[:, :33], plan.reads_carry_BT.long())
    assert torch.equal(fresh[:, :33], 1 - plan.reads_carry_BT.long())
    assert torch.equal(written[:, :33], plan.writes_BT.long())


def test_equal_rows_share_one_block() -> None:
    plan = plan_chunks(None, batch=3, length=8, chunk_size=4, device="cpu")
    assert plan.blocks[1].carried == (Block(slice(0, 3), 0, 4),)
    assert not plan.decays


def test_segments_end_with_chunks_and_documents() -> None:
    plan = plan_row(10, starts=(0, 6))
    edges = [t for t in range(1, 10) if plan.segments_BT[0, t] != plan.segments_BT[0, t - 1]]
    assert edges == [4, 6, 8]


def test_zigzag_slices_of_a_row() -> None:
    """Four spans of one chunk, rank 0 holding the first and the last."""
    whole = plan_row(16, starts=(6, 13), pads=(1,))
    outer = whole.select_tokens([(0, 4), (12, 16)])
    inner = whole.select_tokens([(4, 12)])
    assert places(outer.reads_carry_BT) == [0, 1, 2, 3, 4]
    assert places(outer.writes_BT) == [0, 2, 3, 5, 6, 7]
    assert outer.keeps_BN.tolist() == [[0.5, 0]]
    assert inner.keeps_BN.tolist() == [[0, 0.5]]
    assert outer.blocks == (whole.blocks[0], whole.blocks[3])
    assert outer.padding_BT is not None and places(outer.padding_BT) == [1]


def test_span_keeps_are_products_of_their_chunks() -> None:
    plan = plan_row(24, starts=(17,), pads=tuple(range(4, 8)))
    assert plan.keeps_BN.tolist() == [[0.5, 1, 0.5, 0.5, 0, 0.5]]
    assert plan.span_keeps(3).tolist() == [[0.5], [0.25], [0]]
    with pytest.raises(ValueError, match="6 chunks do not divide into 4"):
        plan.span_keeps(4)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(2, 8)], r"\[2, 8\) are not whole chunks of 4"),
        ([(0, 6)], r"\[0, 6\) are not whole chunks"),
        ([(8, 10), (0, 4)], r"\[8, 10\) are not whole chunks"),
        ([(8, 12)], r"\[8, 12\) are not in a row of 10"),
        ([(4, 4)], r"\[4, 4\) are not in a row"),
    ],
)
def test_slices_off_the_grid(ranges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_row(10).select_tokens(ranges)


def test_chunk_sums_and_their_way_back() -> None:
    plan = plan_row(10)
    values = torch.arange(10.0)[None]
    assert plan.sum_chunks(values).tolist() == [[6, 22, 17]]
    scales = plan.scale_tokens(torch.tensor([[1.0, 2.0, 3.0]]))
    assert scales.tolist() == [[1.0] * 4 + [2.0] * 4 + [3.0] * 2]
