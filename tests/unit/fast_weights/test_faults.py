"""The proof proves something: deliberate faults must fail the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import sweeps, target
from tests.unit.fast_weights import cases
from tests.unit.fast_weights.cases import (
    Case,
    SpansInOrder,
    assert_close,
    documents_case,
    solve_chunked,
    solve_reference,
)

Patch = pytest.MonkeyPatch
KEYS, TARGETS, WRITE_KEYS, WEIGHT, CARRY = range(5)


def change_gradient(place: int, factor: float) -> Callable[[Patch], None]:
    """Multiply one gradient of the scan's backward: 2 is the typical tp or cp mistake, 0 a cut."""

    def apply(patch: Patch) -> None:
        right = sweeps.FastWeightScan.backward

        def wrong(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            results = list(right(ctx, *gradients))
            results[place] = results[place] * factor
            return tuple(results)

        patch.setattr(sweeps.FastWeightScan, "backward", staticmethod(wrong))

    return apply


def double_conv_gradient(patch: Patch) -> None:
    right = target._product_with_neighbour
    patch.setattr(target, "_product_with_neighbour", lambda *a, **k: 2 * right(*a, **k))


def double_proj_gradient(patch: Patch) -> None:
    right = cases.target_from_source

    def wrong(source: Tensor, kernel: Tensor, proj: Tensor, **options: Any) -> Tensor:
        return right(source, kernel, 2 * proj - proj.detach(), **options)

    patch.setattr(cases, "target_from_source", wrong)


def cut_reverse_scan(patch: Patch) -> None:
    patch.setattr(sweeps._GradientSweep, "_read", lambda *_: None)


def ignore_keeps(patch: Patch) -> None:
    patch.setattr(sweeps.ScanCall, "keep_rows", lambda *_: None)


def ignore_document_edges_in_the_conv(patch: Patch) -> None:
    patch.setattr(target, "_crosses_edge", lambda plan, offset: torch.zeros(1, 1, 1).bool())


def drop_reverse_exchange(patch: Patch) -> None:
    right = SpansInOrder.start

    def wrong(
        self: SpansInOrder, summaries: Tensor, *, direction: sweeps.Direction, **factors: Tensor
    ) -> Any:
        pending = right(self, summaries, direction=direction, **factors)
        if direction is sweeps.Direction.REVERSE:
            pending.carries_SBDF.zero_()
        return pending

    patch.setattr(SpansInOrder, "start", wrong)


def forget_gradient_of_the_state(patch: Patch) -> None:
    right = sweeps._GradientSweep.__init__

    def wrong(self: Any, tensors: Any, d_outputs: Tensor, _: Any, call: Any, **needs: bool) -> None:
        right(self, tensors, d_outputs, None, call, **needs)

    patch.setattr(sweeps._GradientSweep, "__init__", wrong)


def ignore_factors(patch: Patch) -> None:
    right = sweeps.ScanCall.keep_rows
    without = {"factors_BN": None}
    patch.setattr(
        sweeps.ScanCall, "keep_rows", lambda call, *a: right(replace(call, **without), *a)
    )


def compare(case: Case) -> None:
    found = solve_chunked(case, spans=2, exchange=SpansInOrder)
    assert_close(found, solve_reference(case), tolerance=1e-4)


FAULTS = {
    "keys' gradient doubled": change_gradient(KEYS, 2),
    "targets' gradient doubled": change_gradient(TARGETS, 2),
    "targets' gradient cut": change_gradient(TARGETS, 0),
    "W0's gradient doubled": change_gradient(WEIGHT, 2),
    "carry's gradient dropped": change_gradient(CARRY, 0),
    "conv's gradient doubled": double_conv_gradient,
    "W_target's gradient doubled": double_proj_gradient,
    "reverse scan cut": cut_reverse_scan,
    "keeps ignored": ignore_keeps,
    "document edges ignored": ignore_document_edges_in_the_conv,
    "reverse exchange dropped": drop_reverse_exchange,
    "state's gradient forgotten": forget_gradient_of_the_state,
}
OTHER_WRITE = {"has_write_keys": True, "has_factors": True}
OTHER_WRITE_FAULTS = {
    **FAULTS,
    "write keys' gradient doubled": change_gradient(WRITE_KEYS, 2),
    "write keys' gradient cut": change_gradient(WRITE_KEYS, 0),
    "factors ignored": ignore_factors,
}


def test_without_a_fault() -> None:
    compare(documents_case())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r" of \d"):
        compare(documents_case())


@pytest.mark.parametrize("fault", OTHER_WRITE_FAULTS.values(), ids=OTHER_WRITE_FAULTS)
def test_a_fault_of_other_writes_is_found(
    fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    """Write keys apart from read keys, and keeps that depend on data."""
    compare(documents_case(**OTHER_WRITE))
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r" of \d"):
        compare(documents_case(**OTHER_WRITE))
