"""The target ``conv(U) @ W_target`` against its reference and torch's own convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_ttt.fast_weights import ChunkPlan, plan_chunks, target_from_source
from megatron_ttt.fast_weights.reference import reference_target
from megatron_ttt.rule import Conv, Normalize
from tests.unit.fast_weights.cases import Case, cases, documents_case, inputs, kernel_of


def plan_of(case: Case) -> ChunkPlan:
    return plan_chunks(
        case.mask(case.starts),
        batch=case.batch,
        length=case.length,
        chunk_size=case.chunk_size,
        padding_BT=case.mask(case.padding),
        device="cpu",
    )


def reference(case: Case, source: Tensor, conv: Tensor | None, proj: Tensor | None) -> Tensor:
    return reference_target(
        source,
        conv,
        proj,
        chunk_size=case.chunk_size,
        document_starts=case.mask(case.starts),
        padding=case.mask(case.padding),
        conv=case.conv,
        normalize=case.normalize,
    )


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_the_reference(case: Case) -> None:
    tensors = inputs(case)
    conv = kernel_of(case, tensors)
    for proj in (tensors["proj"], None):
        found = target_from_source(
            tensors["source"],
            conv,
            proj,
            plan=plan_of(case),
            conv=case.conv,
            normalize=case.normalize,
        )
        torch.testing.assert_close(found, reference(case, tensors["source"], conv, proj))


def test_the_next_token_is_the_target_inside_chunk_and_document() -> None:
    case = Case(length=12, starts=((0, 6), (3,)))
    source = inputs(case)["source"]
    found = target_from_source(source, None, None, plan=plan_of(case), conv=Conv.next_token)
    expected = source.roll(-1, dims=1)
    expected[0, [3, 5, 7, 11]] = 0  # the last of a chunk or document has nobody behind it
    expected[1, [2, 3, 7, 11]] = 0
    torch.testing.assert_close(found, expected)


def test_a_causal_kernel_is_a_centred_one_that_ends_at_the_token() -> None:
    case = documents_case()
    tensors = inputs(case)
    source, plan = tensors["source"], plan_of(case)
    kernel = tensors["conv"][:, :, :3]
    centred = torch.nn.functional.pad(kernel, (0, 2))
    torch.testing.assert_close(
        target_from_source(source, kernel, None, plan=plan, conv=Conv.causal),
        target_from_source(source, centred, None, plan=plan),
    )


def test_equals_a_depthwise_convolution_of_each_chunk() -> None:
    case = Case(length=20)
    tensors = inputs(case)
    found = target_from_source(tensors["source"], tensors["conv"], None, plan=plan_of(case))
    for first in range(0, 20, 4):
        chunk = tensors["source"][:, first : first + 4].transpose(1, 2)
        expected = torch.nn.functional.conv1d(chunk, tensors["conv"], padding=2, groups=5)
        torch.testing.assert_close(found[:, first : first + 4], expected.transpose(1, 2))


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("conv", [Conv.learned, Conv.causal])
@pytest.mark.parametrize("normalize", list(Normalize))
def test_gradcheck(length: int, normalize: Normalize, conv: Conv) -> None:
    case = Case(length=length, starts=((length // 2,), ()), padding=((), (length - 1,)))
    tensors = inputs(case)
    arguments = [tensors[name].requires_grad_() for name in ("source", "conv", "proj")]

    def target(source: Tensor, kernel: Tensor, proj: Tensor) -> Tensor:
        plan = plan_of(case)
        return target_from_source(source, kernel, proj, plan=plan, conv=conv, normalize=normalize)

    assert torch.autograd.gradcheck(target, arguments)


def test_column_shards_concatenate_to_the_whole() -> None:
    case = documents_case()
    tensors = inputs(case)
    source, conv, proj, plan = (tensors["source"], tensors["conv"], tensors["proj"], plan_of(case))
    shards = [target_from_source(source, conv, part, plan=plan) for part in proj.split(2, dim=1)]
    whole = target_from_source(source, conv, proj, plan=plan)
    torch.testing.assert_close(torch.cat(shards, dim=2), whole)


def test_slices_of_whole_chunks_need_no_neighbours() -> None:
    case = documents_case()
    tensors = inputs(case)
    ranges = [(0, 8), (16, 24)]
    tokens = [t for start, stop in ranges for t in range(start, stop)]
    plan = plan_of(case)
    arguments = (tensors["conv"], tensors["proj"])
    whole = target_from_source(tensors["source"], *arguments, plan=plan)
    local = target_from_source(
        tensors["source"][:, tokens], *arguments, plan=plan.select_tokens(ranges)
    )
    torch.testing.assert_close(local, whole[:, tokens])


def test_unit_rms_ignores_the_scale_of_the_source() -> None:
    case = documents_case(normalize=Normalize.key_energy)
    tensors = inputs(case)
    small = target_from_source(
        0.02 * tensors["source"], None, None, plan=plan_of(case), normalize=case.normalize
    )
    real = ~case.mask(case.padding)
    torch.testing.assert_close(small[real].square().mean(dim=1), torch.ones(46).double())
    assert not small[~real].any()


def test_bfloat16_sums_in_float32() -> None:
    """Five terms rounded once: nearer to the truth than bfloat16 sums could be."""
    case = Case(length=40, chunk_size=40, hidden=64)
    tensors = inputs(case, torch.bfloat16)
    source, conv = tensors["source"], tensors["conv"]
    found = target_from_source(source, conv, None, plan=plan_of(case))
    exact = reference(case, source.double(), conv.double(), None)
    torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "conv", "proj", "message"),
    [
        ((2, 20, 5), (5, 1, 5), (5, 5), r"plan is for \[2, 21\], source is \[2, 20\]"),
        ((2, 21, 5), (5, 2, 5), (5, 5), r"conv weight \[5, 2, 5\] is not \[5, 1, taps\]"),
        ((2, 21, 5), (4, 1, 5), (5, 5), r"conv weight \[4, 1, 5\] is not \[5, 1, taps\]"),
        ((2, 21, 5), (5, 1, 5), (4, 5), r"projection \[4, 5\] does not take 5"),
    ],
)
def test_unfit_shapes(
    source: tuple[int, ...], conv: tuple[int, ...], proj: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        target_from_source(
            torch.zeros(source), torch.zeros(conv), torch.zeros(proj), plan=plan_of(Case())
        )
