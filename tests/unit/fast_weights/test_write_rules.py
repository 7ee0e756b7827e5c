"""The write rules against the reference: outputs and every gradient; what each promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from megatron_ttt.fast_weights import TokenInputs, WriteCall, fast_weight_scan, plan_chunks, write
from megatron_ttt.fast_weights.write_rules import WRITE_RULES
from megatron_ttt.rule import (
    GATE,
    GATE_BIAS,
    Clip,
    ClipMode,
    Normalize,
    UpdateRule,
    WriteKind,
    WriteSettings,
)
from tests.unit.fast_weights.cases import (
    Case,
    SpansInOrder,
    assert_close,
    cases,
    documents_case,
    eta_of,
    inputs,
    solve_chunked,
    solve_reference,
    update_rule,
)

RULES = {
    "gated": {"write": WriteSettings(WriteKind.gated)},
    "bounded": {"write": WriteSettings(WriteKind.bounded, 0.05)},
}


def test_every_rule_has_an_equation() -> None:
    assert set(WRITE_RULES) == set(WriteKind)


@pytest.mark.parametrize("spans", [1, 2, 3])
@pytest.mark.parametrize("normalize", list(Normalize))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_equals_the_reference_on_spans(
    rule: dict[str, WriteSettings], normalize: Normalize, spans: int
) -> None:
    """Documents on and off chunk edges, padding, a carry, decay, clip, an exchange."""
    clip = Clip(ClipMode.relative, 0.04)
    case = documents_case(**rule, normalize=normalize, decay=0.9, clip=clip, update_ratio=0.3)
    exchange = SpansInOrder if spans > 1 else None
    found = solve_chunked(case, spans=spans, exchange=exchange)
    expected = solve_reference(case)
    assert_close(found, expected, tolerance=1e-12)
    plain = solve_reference(replace(case, write=WriteSettings()))
    assert not torch.allclose(plain.outputs, expected.outputs, rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_gate_is_one_at_its_start(case: Case) -> None:
    """A checkpoint to which it is added computes what it computed, bit by bit."""
    tensors = inputs(case)
    zeros = {GATE: torch.zeros(case.hidden), GATE_BIAS: torch.zeros(1)}
    plan = plan_chunks(
        None, batch=case.batch, length=case.length, chunk_size=case.chunk_size, device="cpu"
    )
    tokens = TokenInputs(tensors["keys"], tensors["source"], tensors["hidden"])
    targets = tensors["source"] @ tensors["proj"]
    plain, gated = (
        write(
            tokens,
            targets,
            WriteCall(replace(update_rule(case), write=kind), plan, tensors["weight"], zeros),
        )
        for kind in (WriteSettings(), WriteSettings(WriteKind.gated))
    )
    assert torch.equal(plain.targets_BTD, gated.targets_BTD)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_bound_holds_for_any_text(case: Case) -> None:
    """``norm(eta S) <= bound norm(W0)`` at every chunk, with targets a thousand times too large."""
    bound = 0.07
    tensors = inputs(case)
    eta = eta_of(replace(case, update_ratio=0.3))
    rule = replace(update_rule(case), eta=eta, write=WriteSettings(WriteKind.bounded, bound))
    plan = plan_chunks(
        case.mask(case.starts),
        batch=case.batch,
        length=case.length,
        chunk_size=case.chunk_size,
        decay=case.decay,
        padding_BT=case.mask(case.padding),
        device="cpu",
    )
    targets = 1000 * tensors["source"]
    chunk = write(
        TokenInputs(tensors["keys"], targets),
        targets,
        WriteCall(rule, plan, tensors["weight"], {}),
    )
    output = fast_weight_scan(
        tensors["keys"], chunk, tensors["weight"], plan=plan, eta=eta, wants_norms=True
    )
    limit = bound * tensors["weight"].norm() * (1 + 1e-9)
    assert eta * output.state_squares_BN.sqrt().max() <= limit
    assert eta * output.state_BDF.flatten(1).norm(dim=1).max() <= limit


def test_a_bounded_state_is_the_plain_sum_while_it_is_small() -> None:
    case = documents_case(update_ratio=0.05)
    wide = replace(case, write=WriteSettings(WriteKind.bounded, 1e6))
    assert_close(solve_chunked(wide), solve_reference(case), tolerance=1e-6)


def test_a_weight_of_zero_leaves_no_room() -> None:
    rule = UpdateRule(eta=1.0, chunk_size=4, write=WriteSettings(WriteKind.bounded, 0.3))
    plan = plan_chunks(None, batch=1, length=8, chunk_size=4, device="cpu")
    keys, targets, weight = torch.randn(1, 8, 3), torch.randn(1, 8, 2), torch.zeros(2, 3)
    chunk = write(TokenInputs(keys, targets), targets, WriteCall(rule, plan, weight, {}))
    state = fast_weight_scan(keys, chunk, weight, plan=plan, eta=1.0).state_BDF
    assert state.isfinite().all() and state.norm() < 1e-30
