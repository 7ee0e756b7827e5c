"""The chunked fast weight against the reference, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from megatron_ttt.fast_weights import (
    TokenInputs,
    WriteCall,
    fast_weight_linear,
    plan_chunks,
    write,
    written_state,
)
from megatron_ttt.fast_weights.reference import reference_fast_weight
from megatron_ttt.rule import Clip, ClipMode, Normalize, UpdateRule
from tests.unit.fast_weights.cases import (
    Case,
    assert_close,
    cases,
    differentiate,
    documents_case,
    eta_of,
    inputs,
    leaves,
    solve_chunked,
    solve_reference,
    update_rule,
)


def written(
    state: Tensor,
    keys: Tensor,
    targets: Tensor,
    weight: Tensor,
    rule: UpdateRule,
    *,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The state after one chunk of all the tokens given."""
    batch, length, _ = keys.shape
    plan = plan_chunks(
        starts,
        batch=batch,
        length=length,
        chunk_size=length,
        decay=rule.decay,
        padding_BT=padding,
        device="cpu",
    )
    chunk = write(TokenInputs(keys, targets), targets, WriteCall(rule, plan, weight, {}))
    return written_state(state, keys, chunk, weight, plan=plan)


properties = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@properties
@given(case=cases())
def test_float64_equals_the_reference(case: Case) -> None:
    assert_close(solve_chunked(case), solve_reference(case), tolerance=1e-9)


@settings(properties, max_examples=30)
@given(case=cases())
def test_float32_is_near_the_reference(case: Case) -> None:
    found = solve_chunked(case, dtype=torch.float32)
    # A row of one column at unit root mean square is its sign: the source's gradient is 0, and what
    # is found of it is the rounding of terms of order 1 that cancel.
    cancels = case.hidden == 1 and case.normalize is Normalize.key_energy
    least = {"d_source": 1.0} if cancels else {}
    # Sums over a few dozen terms, through a projection that may cancel all but a percent of them.
    assert_close(found, solve_reference(case), tolerance=1e-4, least=least)


def test_bfloat16_keeps_a_float32_state() -> None:
    case = documents_case(update_ratio=0.3)
    found = solve_chunked(case, dtype=torch.bfloat16)
    assert found.state.dtype == torch.float32
    assert found.outputs.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a few roundings of 0.4 % each between inputs and outputs.
    assert_close(found, solve_reference(case), tolerance=3e-2)


@pytest.mark.parametrize("normalize", list(Normalize))
def test_two_calls_with_a_carry_equal_one(normalize: Normalize) -> None:
    """Outputs, final state and every gradient, the cut on a chunk edge inside a document."""
    case = documents_case(normalize=normalize, decay=0.9)
    rule = UpdateRule(eta=0.05, chunk_size=4, decay=0.9, normalize=normalize)
    starts, padding = case.mask(case.starts), case.mask(case.padding)
    tensors = leaves(case, torch.float64)
    targets = tensors["source"] @ tensors["proj"]
    carry, outputs, keep = tensors["carry"], [], torch.ones(2, dtype=torch.float64)
    for part in (slice(0, 12), slice(12, 24)):
        half = fast_weight_linear(
            tensors["keys"][:, part],
            targets[:, part],
            tensors["weight"],
            rule=rule,
            carry_BDF=carry,
            document_starts=starts[:, part],
            padding=padding[:, part],
        )
        carry, keep = half.state_BDF, keep * half.keep_B
        outputs.append(half.outputs_BTD)
    found = differentiate(case, tensors, torch.cat(outputs, dim=1), carry)

    tensors = leaves(case, torch.float64)
    whole = fast_weight_linear(
        tensors["keys"],
        tensors["source"] @ tensors["proj"],
        tensors["weight"],
        rule=rule,
        carry_BDF=tensors["carry"],
        document_starts=starts,
        padding=padding,
    )
    expected = differentiate(case, tensors, whole.outputs_BTD, whole.state_BDF)
    assert_close(found, expected, tolerance=1e-12)
    assert torch.equal(keep, whole.keep_B)


@pytest.mark.parametrize(
    "clip", [Clip(), Clip(ClipMode.relative, 0.1), Clip(ClipMode.absolute, 0.2)]
)
def test_the_unfinished_chunk_can_be_written(clip: Clip) -> None:
    """A row cut in its last chunk and flushed ends in the state of a grid that had fitted."""
    case = documents_case(length=22, starts=((0, 6), (9, 21)), padding=((20,), ()))
    tensors = inputs(case)
    rule = UpdateRule(eta=0.05, chunk_size=4, decay=0.9, clip=clip)
    arguments = (tensors["keys"], tensors["source"], tensors["weight"])
    starts, padding = case.mask(case.starts), case.mask(case.padding)
    row = fast_weight_linear(*arguments, rule=rule, document_starts=starts, padding=padding)
    last = slice(20, 22)
    flushed = written(
        row.state_BDF,
        tensors["keys"][:, last],
        tensors["source"][:, last],
        tensors["weight"],
        rule,
        starts=starts[:, last],
        padding=padding[:, last],
    )
    # The same tokens on a grid that fits: two more of padding complete the chunk.
    full = {
        name: torch.cat([tensors[name], torch.randn(2, 2, tensors[name].shape[2]).double()], dim=1)
        for name in ("keys", "source")
    }
    _, expected = reference_fast_weight(
        full["keys"],
        full["source"],
        tensors["weight"],
        eta=0.05,
        chunk_size=4,
        decay=0.9,
        clip=clip,
        document_starts=torch.nn.functional.pad(starts, (0, 2)),
        padding=torch.nn.functional.pad(padding, (0, 2), value=True),
    )
    assert not torch.allclose(row.state_BDF, expected)
    torch.testing.assert_close(flushed, expected, rtol=1e-12, atol=1e-12)


def test_writing_a_chunk_is_differentiable_and_keeps_rows_of_padding() -> None:
    tensors = inputs(Case(length=3))
    padding = torch.tensor([[False] * 3, [True] * 3])
    names = ("carry", "keys", "source")
    arguments = [tensors[name].requires_grad_() for name in names]

    def of_one_chunk(state: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
        rule = UpdateRule(eta=0.1, decay=0.5)
        return written(state, keys, targets, tensors["weight"], rule, padding=padding)

    assert torch.equal(of_one_chunk(*arguments)[1], tensors["carry"][1])
    assert torch.autograd.gradcheck(of_one_chunk, arguments)


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("eta", [0.3, 0.0])
def test_gradcheck(eta: float, decay: float) -> None:
    """Against finite differences: no oracle of ours involved."""
    case = documents_case(length=10, chunk_size=3, starts=((4,), (6, 7)), padding=((9,), (2,)))
    tensors = leaves(case, torch.float64)
    arguments = [tensors[name] for name in ("keys", "source", "weight", "carry")]

    def both(keys: Tensor, targets: Tensor, weight: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        output = fast_weight_linear(
            keys,
            targets,
            weight,
            rule=UpdateRule(eta=eta, chunk_size=3, decay=decay),
            carry_BDF=carry,
            document_starts=case.mask(case.starts),
            padding=case.mask(case.padding),
        )
        return output.outputs_BTD, output.state_BDF

    assert torch.autograd.gradcheck(both, arguments)


def test_rate_of_zero_is_the_dense_projection_and_returns_the_state() -> None:
    case = documents_case(update_ratio=0.0)
    tensors = inputs(case)
    keys, targets, weight = tensors["keys"], tensors["source"], tensors["weight"]
    zero = fast_weight_linear(keys, targets, weight, rule=UpdateRule(eta=0.0, chunk_size=4))
    live = fast_weight_linear(keys, targets, weight, rule=UpdateRule(eta=0.1, chunk_size=4))
    assert torch.equal(zero.outputs_BTD, keys @ weight.T)
    assert torch.equal(zero.state_BDF, live.state_BDF)
    assert live.state_BDF.norm() > 1


def test_state_squares_are_those_of_the_state_entering_each_chunk() -> None:
    case = documents_case()
    tensors = inputs(case)
    rule, carry = UpdateRule(eta=0.05, chunk_size=4), tensors["carry"]
    starts = case.mask(case.starts)
    arguments = (tensors["keys"], tensors["source"], tensors["weight"])
    found = fast_weight_linear(
        *arguments, rule=rule, carry_BDF=carry, document_starts=starts
    ).state_squares_BN
    assert not found.requires_grad
    for chunk in range(6):
        cut = slice(0, 4 * chunk + 1)
        _, state = reference_fast_weight(
            tensors["keys"][:, cut],
            tensors["source"][:, cut],
            tensors["weight"],
            document_starts=starts[:, cut],
            eta=0.05,
            chunk_size=4,
            carry_BDF=carry,
        )
        torch.testing.assert_close(found[:, chunk], state.square().sum(dim=(1, 2)))


def test_update_ratio_of_the_usual_case_is_alive() -> None:
    case = documents_case()
    tensors = inputs(case)
    output = fast_weight_linear(
        tensors["keys"],
        tensors["source"] @ tensors["proj"],
        tensors["weight"],
        rule=update_rule(case),
        document_starts=case.mask(case.starts),
    )
    largest = eta_of(case) * output.state_squares_BN.max().sqrt() / tensors["weight"].norm()
    assert 0.05 <= largest <= 0.3


def test_no_gradient_work_for_frozen_inputs() -> None:
    tensors = inputs(Case())
    keys, targets = tensors["keys"].requires_grad_(), tensors["source"]
    output = fast_weight_linear(
        keys, targets, tensors["weight"], rule=UpdateRule(eta=0.1, chunk_size=4)
    )
    output.outputs_BTD.sum().backward()
    assert keys.grad is not None
    assert targets.grad is None and tensors["weight"].grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(2, 21, 6)}, r"keys \[2, 21, 6\]"),
        ({"targets": torch.zeros(2, 20, 5)}, r"targets \[2, 20, 5\]"),
        ({"targets": torch.zeros(2, 21, 5, dtype=torch.bfloat16)}, "different dtypes"),
        ({"carry_BDF": torch.zeros(1, 5, 7)}, r"carry \[1, 5, 7\] is not \[2, 5, 7\]"),
        ({"document_starts": torch.zeros(2, 20, dtype=torch.bool)}, r"bool \[2, 21\]"),
        ({"padding": torch.zeros(2, 21)}, "padding must be bool"),
        ({"rule": UpdateRule(decay=0.0)}, "decay 0.0"),
        ({"rule": UpdateRule(decay=1.5)}, "decay 1.5"),
        ({"rule": UpdateRule(chunk_size=0)}, "chunk size 0"),
        ({"rule": UpdateRule(clip=Clip(ClipMode.relative, 0.0))}, "clip bound 0"),
    ],
)
def test_unfit_arguments(changes: dict[str, object], message: str) -> None:
    arguments = {
        "keys": torch.zeros(2, 21, 7),
        "targets": torch.zeros(2, 21, 5),
        "weight": torch.zeros(5, 7),
        "rule": UpdateRule(eta=0.1, chunk_size=4),
        **changes,
    }
    tensors = [arguments.pop(name) for name in ("keys", "targets", "weight")]
    with pytest.raises(ValueError, match=message):
        fast_weight_linear(*tensors, **arguments)
