"""The convolution's Triton kernels against the plain form, in a process of Triton's interpreter.

``test_conv_kernel.py`` starts it: the interpreter has to be on before triton is first imported.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import plan_chunks, target_from_source
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.target import ConvPasses
from megatron_ttt.rule import Conv, Normalize

BATCH, LENGTH, HIDDEN = 3, 150, 70  # nothing is a multiple of a program's share


@pytest.fixture(scope="module")
def passes() -> ConvPasses:
    from megatron_ttt.fast_weights import conv_kernel

    return ConvPasses(conv_kernel.sum_of_neighbours, conv_kernel.products_with_neighbours)


def plan_of(chunk_size: int, places_B: list[list[int]], padding: bool = False) -> ChunkPlan:
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for row, places in enumerate(places_B):
        starts[row, places] = True
    padding_BT = None
    if padding:
        padding_BT = torch.zeros_like(starts)
        padding_BT[0, 40:47], padding_BT[2, 149:] = True, True
    return plan_chunks(
        starts,
        batch=BATCH,
        length=LENGTH,
        chunk_size=chunk_size,
        padding_BT=padding_BT,
        device="cpu",
    )


PLANS = {
    "chunks": plan_of(16, [[], [], []]),
    "documents": plan_of(64, [[0, 1, 2, 63, 64, 100], [5], [0, 149]]),
    "padding": plan_of(7, [[0, 50], [], [33]], padding=True),
    "short": plan_of(1, [[], [3], []]),  # a token is a chunk: it sees itself alone
}


def solved(
    plan: ChunkPlan, dtype: torch.dtype, memory: str, taps: int = 5, **options: Any
) -> list[Tensor]:
    """Targets and both gradients, of tokens in either memory order."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, LENGTH, HIDDEN) if memory == "rows" else (LENGTH, BATCH, HIDDEN)
    source = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    source = (source if memory == "rows" else source.transpose(0, 1)).requires_grad_()
    weight = torch.randn(HIDDEN, 1, taps, generator=generator, dtype=torch.float64).to(dtype)
    weight.requires_grad_()
    targets = target_from_source(source, weight, None, plan=plan, **options)
    upstream = torch.randn(targets.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [targets, *torch.autograd.grad(targets, [source, weight], upstream)]


@pytest.mark.parametrize("memory", ["rows", "tokens first"])
@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_plain_form(passes: ConvPasses, plan: str, memory: str) -> None:
    for kernel in ({}, {"taps": 9}, {"taps": 4, "conv": Conv.causal}):
        found = solved(PLANS[plan], torch.float64, memory, passes=passes, **kernel)
        expected = solved(PLANS[plan], torch.float64, memory, **kernel)
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_the_next_token(passes: ConvPasses, plan: str) -> None:
    source = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(source)
    found, expected = (
        target_from_source(source, None, None, plan=PLANS[plan], conv=Conv.next_token, passes=form)
        for form in (passes, None)
    )
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(one, source, upstream) for one in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_training_precision(passes: ConvPasses, dtype: torch.dtype) -> None:
    """Sums in fp32: as near to fp64 as the plain form."""
    options = {"normalize": Normalize.key_energy}
    exact = solved(PLANS["documents"], torch.float64, "rows", **options)
    found = solved(PLANS["documents"], dtype, "rows", passes=passes, **options)
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    for mine, right in zip(found, exact, strict=True):
        assert (mine.double() - right).norm() < bound * right.norm()


def test_infinities_stay_in_their_document(passes: ConvPasses) -> None:
    plan = plan_of(64, [[0, 50]] * BATCH)
    source = torch.randn(BATCH, LENGTH, HIDDEN)
    source[:, 50:] = float("inf")
    summed = passes.sum_of_neighbours(source, torch.randn(HIDDEN, 5), plan, first=-2, direction=1)
    assert summed[:, :50].isfinite().all() and not summed[:, 50:].isfinite().any()
