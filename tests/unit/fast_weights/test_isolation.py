"""What a token may touch: nothing before it, nothing in another document."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ttt.fast_weights import (
    TokenInputs,
    WriteCall,
    fast_weight_scan,
    plan_chunks,
    target_from_source,
    write,
)
from megatron_ttt.rule import GATE, GATE_BIAS, Clip, ClipMode, Normalize
from tests.unit.fast_weights.cases import (
    Case,
    SpansInOrder,
    cases,
    inputs,
    solve_chunked,
    update_rule,
)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("normalize", list(Normalize))
@pytest.mark.parametrize("clip", [Clip(), Clip(ClipMode.relative, 0.1)])
@pytest.mark.parametrize("spans", [1, 3])
def test_an_infinite_document_does_not_poison_the_others(
    poisoned: int, normalize: Normalize, clip: Clip, spans: int
) -> None:
    """Documents [0, 6), [6, 18) and [18, 24) of one row; two of the borders are inside chunks."""
    borders = [0, 6, 18, 24]
    case = Case(batch=1, length=24, starts=((0, 6, 18),), normalize=normalize, clip=clip)
    case = replace(case, has_carry=False, uses_state=False)
    exchange = SpansInOrder if spans > 1 else None

    clean = solve_chunked(case, spans=spans, exchange=exchange)
    middle = (borders[poisoned] + borders[poisoned + 1]) // 2
    poison = {"keys": (middle, float("inf")), "source": (middle, float("-inf"))}
    sick = solve_chunked(case, spans=spans, exchange=exchange, poison=poison)

    others = [t for t in range(24) if not borders[poisoned] <= t < borders[poisoned + 1]]
    assert not sick.outputs.isfinite().all()
    for name, found, expected in (
        ("outputs", sick.outputs, clean.outputs),
        ("keys", sick.gradients["keys"], clean.gradients["keys"]),
        ("source", sick.gradients["source"], clean.gradients["source"]),
    ):
        torch.testing.assert_close(found[:, others], expected[:, others], msg=name)


def read_row(case: Case, source: Tensor) -> Tensor:
    """Outputs of a layer whose keys, like its targets, follow from the source alone."""
    tensors = inputs(case)
    mask = {"document_starts": case.mask(case.starts), "padding": case.mask(case.padding)}
    plan = plan_chunks(
        mask["document_starts"],
        batch=case.batch,
        length=case.length,
        chunk_size=case.chunk_size,
        decay=case.decay,
        padding_BT=mask["padding"],
        device="cpu",
    )
    rule, weight = update_rule(case), tensors["weight"]
    keys = torch.tanh(source @ weight)
    targets = target_from_source(
        source, tensors["conv"], tensors["proj"], plan=plan, normalize=case.normalize
    )
    own = {GATE: tensors["gate"], GATE_BIAS: tensors["gate_bias"]}
    written = write(TokenInputs(keys, source), targets, WriteCall(rule, plan, weight, own))
    return fast_weight_scan(keys, written, weight, plan=plan, eta=rule.eta).outputs_BTD


def touched(case: Case, token: int) -> list[int]:
    """Tokens of row 0 whose outputs move when ``token`` of row 0 does; row 1 never may."""
    source = inputs(case)["source"]
    changed = source.clone()
    changed[0, token] += torch.linspace(1.0, 2.0, case.hidden, dtype=torch.float64)
    moved = (read_row(case, changed) != read_row(case, source)).any(dim=2)
    assert not moved[1:].any()
    return moved[0].nonzero().flatten().tolist()


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_no_output_moves_before_the_token_that_changed(case: Case, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, case.length - 1))
    assert all(t >= token for t in touched(case, token))


@pytest.mark.parametrize("normalize", list(Normalize))
@pytest.mark.parametrize("clip", [Clip(), Clip(ClipMode.relative, 0.01)])
@pytest.mark.parametrize("token", range(21))
def test_a_token_reaches_the_later_chunks_of_its_document_and_nothing_else(
    token: int, normalize: Normalize, clip: Clip
) -> None:
    """Exactly: itself, and every later chunk that reads what its chunk wrote.

    Chunks of 4; documents [0, 4), [4, 10), [10, 21): the second ends inside a chunk.
    """
    case = Case(starts=((0, 4, 10), ()), normalize=normalize, clip=clip, update_ratio=0.3)
    document = (0, 4) if token < 4 else (4, 10) if token < 10 else (10, 21)
    next_chunk = (token // 4 + 1) * 4
    # [8, 10) is in the chunk of the third document's start: it reads, its writing is dropped.
    readers = [] if 8 <= token < 10 else range(next_chunk, document[1])
    assert touched(case, token) == [token, *readers]
