"""The chunked fast weight against the reference, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.unit.fast_weights.cases import (
    Case,
    SpansInOrder,
    assert_close,
    cases,
    documents_case,
    solve_chunked,
    solve_reference,
)

properties = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@properties
@given(case=cases())
def test_float64_equals_the_reference(case: Case) -> None:
    assert_close(solve_chunked(case), solve_reference(case), tolerance=1e-9)


@settings(properties, max_examples=30)
@given(case=cases())
def test_float32_is_near_the_reference(case: Case) -> None:
    found = solve_chunked(case, dtype=torch.float32)
    # Sums over a few dozen terms, through a projection that may cancel all but a percent of them.
    assert_close(found, solve_reference(case), tolerance=1e-4)


@settings(properties, max_examples=30)
@given(case=cases(whole_spans=3))
def test_spans_with_an_exchange_equal_the_whole_row(case: Case) -> None:
    split = solve_chunked(case, spans=3, exchange=SpansInOrder)
    assert_close(split, solve_reference(case), tolerance=1e-9)


@pytest.mark.parametrize("spans", [1, 2, 6])
def test_any_number_of_spans(spans: int) -> None:
    case = documents_case()
    split = solve_chunked(case, spans=spans, exchange=SpansInOrder)
    assert_close(split, solve_reference(case), tolerance=1e-10)


def test_megatron_strides_and_their_outputs() -> None:
    case = documents_case()
    found = solve_chunked(case, tokens_first=True)
    assert_close(found, solve_reference(case), tolerance=1e-10)
    assert found.outputs.transpose(0, 1).is_contiguous()
    assert found.gradients["keys"].shape == (2, 24, 7)


def test_bfloat16_keeps_a_float32_state() -> None:
    case = documents_case(update_ratio=0.3)
    found = solve_chunked(case, dtype=torch.bfloat16)
    assert found.state.dtype == torch.float32
    assert found.outputs.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a few roundings of 0.4 % each between inputs and outputs.
    assert_close(found, solve_reference(case), tolerance=3e-2)
