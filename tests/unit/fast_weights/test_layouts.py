"""The same row however it is held: spans, ranks, shards of the keys, memory order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from megatron_ttt.fast_weights import (
    FastWeightOutput,
    Write,
    fast_weight_linear,
    fast_weight_scan,
    plan_chunks,
    target_from_source,
)
from megatron_ttt.fast_weights.reference import reference_fast_weight, reference_target
from megatron_ttt.rule import Clip, ClipMode, Normalize
from tests.unit.fast_weights.cases import (
    GRADIENTS,
    Case,
    SpansInOrder,
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
from tests.unit.fast_weights.in_threads import InThreads, ThreadedExchange

properties = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


@pytest.mark.parametrize("mode", [ClipMode.relative, ClipMode.absolute])
@pytest.mark.parametrize("normalize", list(Normalize))
def test_shards_of_the_keys_agree_through_the_reducer(mode: ClipMode, normalize: Normalize) -> None:
    """Tensor parallelism: a shard sees its columns of keys and weight, sums are reduced."""
    case = documents_case(clip=Clip(mode, 0.01), normalize=normalize)
    tensors = inputs(case)
    rule = update_rule(case)
    options = {"rule": rule, "document_starts": case.mask(case.starts)}
    keys, targets, weight = tensors["keys"], tensors["source"], tensors["weight"]
    whole = fast_weight_linear(keys, targets, weight, **options)
    unclipped = fast_weight_linear(
        keys, targets, weight, **{**options, "rule": replace(rule, clip=Clip())}
    )
    assert not torch.allclose(whole.outputs_BTD, unclipped.outputs_BTD)

    shards = (slice(0, 3), slice(3, 7))
    ranks = InThreads(2)

    def shard(rank: int) -> FastWeightOutput:
        part = shards[rank]
        return fast_weight_linear(
            keys[..., part],
            targets,
            weight[:, part],
            reduce_sums=lambda sums: torch.stack(ranks.gather(rank, sums)).sum(dim=0),
            **options,
        )

    outputs = ranks.run(shard)
    torch.testing.assert_close(sum(output.outputs_BTD for output in outputs), whole.outputs_BTD)
    state = torch.cat([output.state_BDF for output in outputs], dim=2)
    torch.testing.assert_close(state, whole.state_BDF)


@pytest.mark.parametrize("held", [((0, 3), (1, 2)), ((0, 1), (2, 3))], ids=["zigzag", "contiguous"])
@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize("other_write", [False, True])
def test_two_ranks_with_two_spans_each(
    held: tuple[tuple[int, int], ...], decay: float, other_write: bool
) -> None:
    """Plans cut by ``select_tokens``, carries exchanged between the ranks, all gradients whole."""
    case = documents_case(starts=((6, 9), (20,)), padding=((), (0, 1)), decay=decay)
    case = replace(case, has_write_keys=other_write, has_factors=other_write)
    eta, span_length = eta_of(case), case.length // 4
    case = replace(case, chunk_size=3)
    plan = plan_chunks(
        case.mask(case.starts),
        batch=2,
        length=case.length,
        chunk_size=3,
        decay=decay,
        padding_BT=case.mask(case.padding),
        device="cpu",
    )
    ranks = InThreads(2)

    def rank_part(rank: int) -> dict[str, Tensor]:
        tensors = leaves(case, torch.float64)
        ranges = [(span * span_length, (span + 1) * span_length) for span in held[rank]]
        tokens = [t for start, stop in ranges for t in range(start, stop)]
        local = plan.select_tokens(ranges)
        owns_first, owns_last = 0 in held[rank], 3 in held[rank]
        targets = target_from_source(
            tensors["source"][:, tokens], tensors["conv"], tensors["proj"], plan=local
        )
        chunks = [t // 3 for t in tokens[::3]]
        output = fast_weight_scan(
            tensors["keys"][:, tokens],
            Write(
                targets,
                tensors["write_keys"][:, tokens] if case.has_write_keys else None,
                tensors["factors"][:, chunks] if case.has_factors else None,
            ),
            tensors["weight"],
            plan=local,
            eta=eta,
            spans=2,
            exchange=ThreadedExchange(ranks, rank, held, plan.span_keeps(4)),
            carry_BDF=tensors["carry"] if owns_first else None,
        )
        loss = (output.outputs_BTD * tensors["d_outputs"][:, tokens]).sum()
        if owns_last:
            loss = loss + case.update_ratio * (output.state_BDF * tensors["d_state"]).sum()
        gradients = torch.autograd.grad(loss, [tensors[n] for n in GRADIENTS], allow_unused=True)
        found = {
            f"d_{name}": torch.zeros_like(tensors[name]) if gradient is None else gradient
            for name, gradient in zip(GRADIENTS, gradients, strict=True)
        }
        outputs = torch.zeros_like(tensors["d_outputs"])
        outputs[:, tokens] = output.outputs_BTD.detach()
        return {"outputs": outputs, **found}

    parts = ranks.run(rank_part)
    tensors = leaves(case, torch.float64)
    layout = {
        "chunk_size": 3,
        "document_starts": case.mask(case.starts),
        "padding": case.mask(case.padding),
    }
    targets = reference_target(tensors["source"], tensors["conv"], tensors["proj"], **layout)
    outputs, state = reference_fast_weight(
        tensors["keys"],
        targets,
        tensors["weight"],
        eta=eta,
        carry_BDF=tensors["carry"],
        decay=decay,
        write_keys_BTF=tensors["write_keys"] if case.has_write_keys else None,
        factors_BN=tensors["factors"] if case.has_factors else None,
        **layout,
    )
    expected = differentiate(case, tensors, outputs, state)
    torch.testing.assert_close(sum(part["outputs"] for part in parts), expected.outputs)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(sum(part[f"d_{name}"] for part in parts), gradient, msg=name)


@pytest.mark.parametrize(
    ("spans", "length", "exchange", "message"),
    [
        (2, 24, None, "2 spans need an exchange"),
        (5, 24, SpansInOrder(torch.ones(5, 1)), "24 tokens are not 5 equal spans"),
        (2, 21, SpansInOrder(torch.ones(2, 1)), "21 tokens are not 2 equal spans"),
    ],
)
def test_unfit_spans(spans: int, length: int, exchange: SpansInOrder | None, message: str) -> None:
    tensors = inputs(Case(batch=1, length=length))
    plan = plan_chunks(None, batch=1, length=length, chunk_size=4, device="cpu")
    with pytest.raises(ValueError, match=message):
        fast_weight_scan(
            tensors["keys"],
            Write(tensors["source"]),
            tensors["weight"],
            plan=plan,
            eta=0.1,
            spans=spans,
            exchange=exchange,
        )
