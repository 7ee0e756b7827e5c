"""The fast weight on a CUDA device: every way of accumulating, and the whole scan in bfloat16."""

from __future__ import annotations

import pytest
import torch

from megatron_ttt.fast_weights import fast_weight_linear
from megatron_ttt.fast_weights.accumulate import (
    Accumulator,
    accumulate_product,
    choose_accumulator,
    wide_product,
)
from megatron_ttt.rule import UpdateRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def available(state: torch.Tensor, operand: torch.Tensor) -> list[Accumulator]:
    return list({choose_accumulator(state, operand), Accumulator.TORCH, Accumulator.UPCAST})


def test_every_accumulator_adds_in_float32() -> None:
    left, right = draw(2, 512, 64), draw(512, 2, 96).transpose(0, 1)
    for how in available(torch.zeros(2, 64, 96, device="cuda"), left):
        state = draw(2, 64, 96, dtype=torch.float32)
        expected = state.double() + left.double().mT @ right.double()
        accumulate_product(state, left, right, accumulator=how)
        torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-3, msg=how.value)


def test_bfloat16_is_not_upcast_on_a_gpu() -> None:
    low = draw(1, 8, 8)
    chosen = choose_accumulator(torch.zeros(1, 8, 8, device="cuda"), low)
    assert chosen in (Accumulator.APEX, Accumulator.TORCH, Accumulator.TRANSFORMER_ENGINE)


def test_wide_product() -> None:
    left, right = draw(2, 32, 64), draw(2, 64, 48)
    torch.testing.assert_close(
        wide_product(left, right).double(), left.double() @ right.double(), rtol=1e-4, atol=1e-3
    )


def test_bfloat16_scan_is_near_the_float64_scan() -> None:
    tensors = [draw(2, 1000, 256), draw(2, 1000, 128), draw(128, 256)]
    starts = torch.zeros(2, 1000, dtype=torch.bool)
    starts[0, [300, 512]] = True
    found, expected = [], []
    for results, dtype in ((found, torch.bfloat16), (expected, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = fast_weight_linear(
            *leaves, rule=UpdateRule(eta=0.003, chunk_size=128), document_starts=starts
        )
        output.outputs_BTD.square().sum().backward()
        results += [output.outputs_BTD.detach(), output.state_BDF.detach()]
        results += [leaf.grad for leaf in leaves]
    for low, exact in zip(found, expected, strict=True):
        # A few roundings to bfloat16 (0.4 %) lie between inputs and each result.
        assert (low.double() - exact).norm() <= 2e-2 * exact.norm()
