"""The products that the scan is said to cost, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ttt.fast_weights import Write, fast_weight_scan, plan_chunks
from tests.unit.fast_weights.cases import SpansInOrder

CHUNK, CHUNKS, HIDDEN, FFN = 8, 32, 16, 24
UNIT = 2 * CHUNK * CHUNKS * HIDDEN * FFN


def product_flops(self_shape: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


def units(
    *, spans: int = 1, decay: float = 1.0, uses_state: bool = False, group_chunks: int = 1
) -> tuple[float, float]:
    """Products of tokens x hidden x ffn in the forward and in the backward."""
    length = CHUNK * CHUNKS
    plan = plan_chunks(None, batch=1, length=length, chunk_size=CHUNK, decay=decay, device="cpu")
    keys = torch.randn(1, length, FFN, requires_grad=True)
    targets = torch.randn(1, length, HIDDEN, requires_grad=True)
    weight = torch.randn(HIDDEN, FFN, requires_grad=True)
    counted = {torch.ops.aten.baddbmm_: product_flops}  # torch's own counter does not know it
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        output = fast_weight_scan(
            keys,
            Write(targets),
            weight,
            plan=plan,
            eta=0.1,
            spans=spans,
            exchange=SpansInOrder(plan.span_keeps(spans)) if spans > 1 else None,
            group_chunks=group_chunks,
            wants_norms=False,
        )
    forward = counter.get_total_flops()
    loss = output.outputs_BTD.sum() + (output.state_BDF.sum() if uses_state else 0.0)
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        loss.backward()
    return forward / UNIT, counter.get_total_flops() / UNIT


@pytest.mark.parametrize(
    ("spans", "decay", "uses_state", "forward", "backward"),
    [
        (1, 1.0, False, 2, 5),
        (1, 0.9, False, 2, 6),
        (1, 1.0, True, 2, 6),
        (2, 1.0, False, 2.5, 6),  # the row's last span is not summarised: 3 on the other ranks
        (2, 0.9, False, 2.5, 7),
    ],
)
def test_units(spans: int, decay: float, uses_state: bool, forward: float, backward: float) -> None:
    """Never more than said; the edges' savings (one chunk of 32 per sweep) keep it near."""
    found = units(spans=spans, decay=decay, uses_state=uses_state)
    assert forward - 0.2 < found[0] <= forward
    assert backward - 0.2 < found[1] <= backward


@pytest.mark.parametrize("group_chunks", [4, 16])
def test_units_of_groups(group_chunks: int) -> None:
    """What is read inside groups adds at most the square of each, for D and F, as many times as the
    equations of ``inside.py`` have products; every part of it is counted."""
    tokens = CHUNK * group_chunks
    inside, once = (tokens / HIDDEN, tokens / FFN), units()
    found = units(group_chunks=group_chunks)
    forward, backward = (found[side] - once[side] for side in range(2))
    least = (1 - 1 / group_chunks) / 2  # the triangle without its diagonal blocks
    assert least * sum(inside) - 0.2 < forward <= sum(inside)
    products = 3 * inside[0] + 2 * inside[1]
    assert least * products - 0.2 < backward <= products
