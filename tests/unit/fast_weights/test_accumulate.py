"""Products summed into a wide state, on the CPU; the GPU's ways are in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from megatron_ttt.fast_weights.accumulate import (
    Accumulator,
    accumulate_product,
    choose_accumulator,
    state_dtype,
    wide_product,
)


@pytest.mark.parametrize(
    ("compute", "wide"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_state_dtype(compute: torch.dtype, wide: torch.dtype) -> None:
    assert state_dtype(compute) == wide


def test_choice_on_the_cpu() -> None:
    state = torch.zeros(1, 2, 3)
    assert choose_accumulator(state, torch.zeros(1, 4, 2)) is Accumulator.SAME_DTYPE
    low = torch.zeros(1, 4, 2, dtype=torch.bfloat16)
    assert choose_accumulator(state, low) is Accumulator.UPCAST


@pytest.mark.parametrize("tokens", [1, 7, 2500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adds_to_what_is_there(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, tokens, 5, generator=generator).to(dtype)
    right = torch.randn(tokens, 2, 6, generator=generator).to(dtype).transpose(0, 1)
    state = torch.randn(2, 5, 6, generator=generator).to(state_dtype(dtype))
    expected = state.double() + left.double().mT @ right.double()
    accumulate_product(state, left, right)
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-4)


def test_small_updates_survive_in_low_precision() -> None:
    """1 + 1000 * 2**-10: a bfloat16 sum would stay at 1."""
    state = torch.ones(1, 1, 1)
    small = torch.full((1, 1, 1), 2.0**-5, dtype=torch.bfloat16)
    for _ in range(1000):
        accumulate_product(state, small, small)
    assert state.item() == 1 + 1000 * 2.0**-10


def test_wide_product_of_low_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 5, 7, generator=generator).bfloat16()
    right = torch.randn(2, 7, 3, generator=generator).bfloat16()
    found = wide_product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, left.float() @ right.float())
