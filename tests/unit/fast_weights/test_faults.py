"""The proof proves something: deliberate faults must fail the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable
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
KEYS, TARGETS, WEIGHT, CARRY = range(4)


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

    def wrong(source: Tensor, conv: Tensor, proj: Tensor, **options: Any) -> Tensor:
        return right(source, conv, 2 * proj - proj.detach(), **options)

    patch.setattr(cases, "target_from_source", wrong)


def cut_reverse_scan(patch: Patch) -> None:
    patch.setattr(sweeps._GradientSweep, "_read", lambda *_: None)


def ignore_keeps(patch: Patch) -> None:
    patch.setattr(sweeps, "_keep_rows", lambda *_: None)


def ignore_document_edges_in_the_conv(patch: Patch) -> None:
    patch.setattr(target, "_crosses_edge", lambda plan, offset: torch.zeros(1, 1, 1).bool())


def drop_reverse_exchange(patch: Patch) -> None:
    right = SpansInOrder.start

    def wrong(self: SpansInOrder, summaries: Tensor, *, direction: sweeps.Direction) -> Any:
        pending = right(self, summaries, direction=direction)
        if direction is sweeps.Direction.REVERSE:
            pending.carries_SBDF.zero_()
        return pending

    patch.setattr(SpansInOrder, "start", wrong)


def forget_gradient_of_the_state(patch: Patch) -> None:
    right = sweeps._GradientSweep.__init__

    def wrong(self: Any, keys: Tensor, *arguments: Any) -> None:
        changed = list(arguments)
        changed[3] = None
        right(self, keys, *changed)

    patch.setattr(sweeps._GradientSweep, "__init__", wrong)


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


def test_without_a_fault() -> None:
    compare(documents_case())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r" of \d"):
        compare(documents_case())
