"""Groups of chunks against chunks: what is read and written, norms, documents on every edge."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import Write, fast_weight_scan, plan_chunks
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.groups import Segment, group_size, groups_of
from megatron_ttt.fast_weights.inside import InsideScores

C = 4


def plan_of(
    starts: list[list[int]], length: int, padding: list[list[int]] | None = None
) -> ChunkPlan:
    masks = []
    for places_B in (starts, padding or [[] for _ in starts]):
        mask = torch.zeros(len(starts), length, dtype=torch.bool)
        for row, places in enumerate(places_B):
            mask[row, places] = True
        masks.append(mask)
    return plan_chunks(
        masks[0], batch=len(starts), length=length, chunk_size=C, padding_BT=masks[1], device="cpu"
    )


def test_a_group_in_words() -> None:
    """Chunks of 4: a document over the first two, one from token 9 on, over two groups of three."""
    plan = plan_of([[0, 9]], 24)
    ((first, second),) = groups_of(plan, chunks=3, spans=1)
    whole = slice(0, 1)
    assert [(g.first, g.last, g.start) for g in (first, second)] == [(0, 3, 0), (3, 6, 12)]
    # tokens 4 to 8 read what tokens 0 to 3 wrote; 9 to 11 are the first chunk of their document
    assert first.segments == (Segment(whole, (4, 9), ((0, 8),)),)
    assert first.blocks.keeps == (0.0,) and second.blocks.keeps == (1.0,)
    assert [(b.start, b.stop) for b in first.blocks.written] == [(9, 12)]
    assert [(b.start, b.stop) for b in first.blocks.fresh] == [(0, 12)]
    assert second.segments == (Segment(whole, (16, 24), ((12, 24),)),)
    assert [(b.start, b.stop) for b in second.blocks.carried] == [(0, 12)]


def test_rows_of_one_structure_are_one_segment() -> None:
    plan = plan_of([[0], [0], [0, 6]], 16, padding=[[], [], [10, 11]])
    ((group,),) = groups_of(plan, chunks=4, spans=1)
    assert [segment.rows for segment in group.segments] == [slice(0, 2), slice(2, 3), slice(2, 3)]
    assert group.segments[2].writes == ((6, 10), (12, 16))  # padding lies between
    assert groups_of(plan, chunks=4, spans=1)[0][0] is group  # made once


def test_sizes() -> None:
    def size(**changes: Any) -> int:
        given = {"hidden": 512, "ffn": 1536, "is_cpu": True, "has_factors": False}
        return group_size(plan, **{**given, **changes})

    plan = plan_of([[0]], 4 * C)
    qwen3_4b = {"hidden": 2560, "ffn": 9728}
    assert size() == size(hidden=1024, ffn=3072) == 256 // C
    assert size(**qwen3_4b) == 1024 // C and size(**qwen3_4b, is_cpu=False) == 2048 // C
    assert size(hidden=2560, ffn=9728 // 8, is_cpu=False) == 1024 // C  # a shard of eight
    assert size(has_factors=True) == 1
    decaying = plan_chunks(None, batch=1, length=64, chunk_size=C, decay=0.9, device="cpu")
    assert group_size(decaying, hidden=8, ffn=16, is_cpu=True, has_factors=False) == 1
    large = plan_chunks(None, batch=1, length=1024, chunk_size=512, device="cpu")
    assert group_size(large, hidden=8, ffn=16, is_cpu=True, has_factors=False) == 1


def solve(
    plan: ChunkPlan, group_chunks: int, scores: InsideScores = InsideScores.REMADE
) -> dict[str, Tensor]:
    """Outputs, state, norms and every gradient, in fp64, with write keys of their own."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    batch, length = plan.batch, plan.length
    keys, write_keys, targets = (draw(batch, length, n) for n in (7, 7, 5))
    weight, carry = draw(5, 7), draw(batch, 5, 7)
    output = fast_weight_scan(
        keys,
        Write(targets, write_keys),
        weight,
        plan=plan,
        eta=0.1,
        carry_BDF=carry,
        group_chunks=group_chunks,
        scores=scores,
        wants_norms=True,
    )
    upstream = draw(*output.outputs_BTD.shape).detach()
    loss = (output.outputs_BTD * upstream).sum() + output.state_BDF.square().sum()
    names = ("keys", "write_keys", "targets", "weight", "carry")
    leaves = (keys, write_keys, targets, weight, carry)
    found = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    return found | {
        "outputs": output.outputs_BTD.detach(),
        "state": output.state_BDF.detach(),
        "norms": output.state_squares_BN.sqrt(),
    }


@pytest.mark.parametrize("scores", list(InsideScores))
@pytest.mark.parametrize("group_chunks", [2, 3, 64])
@pytest.mark.parametrize(
    ("starts", "padding"),
    [
        ([[0], []], None),
        ([[0, 5, 6, 7, 30], [0, 16, 17]], None),
        ([[0, 12], [3, 24, 36]], [[20, 21, 22, 23], [0, 1, 2, 41]]),
        ([[0, 40], [0, 41]], [[8, 9], list(range(12, 24))]),
    ],
)
def test_groups_are_equal_to_chunks(
    starts: list[list[int]],
    padding: list[list[int]] | None,
    group_chunks: int,
    scores: InsideScores,
) -> None:
    plan = plan_of(starts, 42, padding)  # the last chunk is unfinished
    once, grouped = solve(plan, 1), solve(plan, group_chunks, scores)
    for name, wanted in once.items():
        torch.testing.assert_close(grouped[name], wanted, rtol=1e-11, atol=1e-11, msg=name)
    assert once["norms"].max() > 1


def test_groups_with_decay_or_factors_are_refused() -> None:
    """Their products know neither; the size by default is one chunk there."""
    decaying = plan_chunks(None, batch=1, length=16, chunk_size=C, decay=0.9, device="cpu")
    keys, targets, weight = torch.ones(1, 16, 3), torch.ones(1, 16, 2), torch.ones(2, 3)
    factors = torch.full((1, 4), 0.5)
    for plan, write in (
        (decaying, Write(targets)),
        (plan_of([[0]], 16), Write(targets, None, factors)),
    ):
        with pytest.raises(ValueError, match="groups of 2 chunks know neither decay nor factors"):
            fast_weight_scan(keys, write, weight, plan=plan, eta=0.1, group_chunks=2)
        fast_weight_scan(keys, write, weight, plan=plan, eta=0.1)
