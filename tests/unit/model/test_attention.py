"""The torch attention against attention written out: documents, windows, spans, grouped heads."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.model import attention_plan, masked_attention
from megatron_ttt.model.attention import Kernel, TorchAttention, attend, kernel_for
from megatron_ttt.model.attention_plan import AttentionPlan, Stretch, plan_attention, plan_reading
from megatron_ttt.model.block_attention import block_attention
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.model.varlen_attention import pack, varlen_attention
from tests.distributed.training_runs import tiny_config

LENGTH, BATCH, HEADS, GROUPS, DIM = 37, 2, 4, 2, 12
SCALE = DIM**-0.5
WHOLE = [(0, LENGTH)]
SPANS = [(5, 14), (23, 37)]  # runs of a zigzag rank, the second one up to the row's end
STARTS = {
    "one document": [[], []],
    "two rows": [[0, 8, 21], [30]],
    "alike": [[0, 9, 10, 14, 36], [0, 9, 10, 14, 36]],  # one of one token, one on a span's edge
}

Attention = Callable[[Tensor, Tensor, Tensor, AttentionPlan, int | None], Tensor]


def starts_of(places_B: list[list[int]]) -> Tensor:
    starts = torch.zeros(len(places_B), LENGTH, dtype=torch.bool)
    for row, places in enumerate(places_B):
        starts[row, places] = True
    return starts


def written_out(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, starts: Tensor
) -> Tensor:
    """Softmax attention token by token, of whole rows: ``[B, A, T, E]``."""
    documents, outputs = starts.cumsum(1), torch.zeros_like(query)
    for row in range(BATCH):
        for place in range(LENGTH):
            first = 0 if window is None else max(0, place - window + 1)
            seen = [
                p for p in range(first, place + 1) if documents[row, p] == documents[row, place]
            ]
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = key[row, group, seen] @ query[row, head, place] * SCALE
                outputs[row, head, place] = scores.softmax(0) @ value[row, group, seen]
    return outputs


def drawn(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value in Megatron's memory order, seen as ``[B, heads, T, E]``."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(LENGTH, BATCH, heads, DIM, dtype=torch.float64, generator=generator)
        .to(dtype)
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def by_blocks(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None) -> Tensor:
    return block_attention(q, k, v, plan=plan, window=window, scale=SCALE)


def by_masks(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None) -> Tensor:
    return masked_attention.masked_attention(q, k, v, plan=plan, window=window, scale=SCALE)


def packed_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What the variable-length kernel is documented to compute: queries end where keys end."""
    assert query_ends.dtype == key_ends.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa and query_ends[-1] == len(query) and key_ends[-1] == len(key)
    outputs = torch.zeros_like(query)
    counts = [ends.diff().tolist() for ends in (query_ends, key_ends)]
    assert (longest_query, longest_key) == (max(counts[0]), max(counts[1]))
    for document, (count, held) in enumerate(zip(*counts, strict=True)):
        own = slice(int(query_ends[document]), int(query_ends[document + 1]))
        seen = slice(int(key_ends[document]), int(key_ends[document + 1]))
        place = torch.arange(held - count, held)[:, None] - torch.arange(held)
        visible = place >= 0
        if window_size[0] >= 0:
            visible &= place <= window_size[0]
        keys, values = (t[seen].repeat_interleave(HEADS // GROUPS, 1) for t in (key, value))
        scores = torch.einsum("qae,kae->aqk", query[own], keys) * scale
        shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs[own] = torch.einsum("aqk,kae->qae", shares, values)
    return outputs


def by_packing(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None) -> Tensor:
    packed = pack(plan, torch.device("cpu"))
    return varlen_attention(
        q, k, v, packed=packed, window=window, scale=SCALE, kernel=packed_kernel
    )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one unfinished."""
    for module in (attention_plan, masked_attention):
        monkeypatch.setattr(module, "LARGEST_BLOCK", 8)
    monkeypatch.setattr(attention_plan, "SMALLEST_BLOCK", 4)


@pytest.mark.parametrize("attention", [by_blocks, by_masks, by_packing])
@pytest.mark.parametrize("ranges", [WHOLE, SPANS], ids=["whole", "spans"])
@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize("window", [None, 1, 6, 9, LENGTH])
def test_equals_attention_written_out(
    attention: Attention, ranges: list[tuple[int, int]], documents: str, window: int | None
) -> None:
    starts, tensors = starts_of(STARTS[documents]), drawn()
    plan = plan_attention(starts, batch=BATCH, ranges=ranges)
    query = torch.cat([tensors[0][:, :, start:end] for start, end in ranges], dim=2)
    found = attention(query, tensors[1], tensors[2], plan, window)
    whole = written_out(*tensors, window, starts)
    expected = torch.cat([whole[:, :, start:end] for start, end in ranges], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    for mine, right in zip(
        torch.autograd.grad(found, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_in_training_precision(dtype: torch.dtype) -> None:
    """Gradients of a key that many tiles see are added up in fp32."""
    starts = starts_of(STARTS["two rows"])
    plan = plan_attention(starts, batch=BATCH, ranges=WHOLE)
    tensors, exact = drawn(dtype), drawn()
    upstream = torch.randn(exact[0].shape, dtype=torch.float64)
    found = by_blocks(*tensors, plan, 9)
    expected = written_out(*exact, 9, starts)
    bound = 2e-6 if dtype is torch.float32 else 1.5e-2
    gradients = torch.autograd.grad(found, tensors, upstream.to(dtype))
    exact_gradients = torch.autograd.grad(expected, exact, upstream)
    for mine, right in zip([found, *gradients], [expected, *exact_gradients], strict=True):
        assert (mine.double() - right).norm() < bound * right.norm()


@pytest.mark.parametrize("attention", [by_blocks, by_masks, by_packing])
@pytest.mark.parametrize("window", [None, 9])
def test_nothing_of_another_document_is_touched(attention: Attention, window: int | None) -> None:
    """Not even multiplied by 0: infinities and what is not a number stay where they are."""
    plan = plan_attention(starts_of([[0, 13, 25]] * BATCH), batch=BATCH, ranges=WHOLE)
    tensors = drawn()
    with torch.no_grad():
        for tensor in tensors:
            tensor[:, :, 13:25] = float("nan")
    found = attention(*tensors, plan, window)
    clean = [found[:, :, :13], found[:, :, 25:]]
    assert all(part.isfinite().all() for part in clean)
    gradients = torch.autograd.grad(sum(part.sum() for part in clean), tensors)
    for gradient in gradients:
        assert gradient[:, :, :13].isfinite().all() and gradient[:, :, 25:].isfinite().all()


@pytest.mark.parametrize("attention", [by_blocks, by_masks])
@pytest.mark.parametrize("window", [None, 5])
def test_rows_that_stand_at_different_places(attention: Attention, window: int | None) -> None:
    """A call's real tokens continue what each row has read; its padding gets zeros."""
    tensors = drawn()
    expected = written_out(*tensors, window, starts_of([[], []]))
    # row 0 has read 20 tokens and gets 9 behind 2 of padding; row 1 has read 3 and gets 4
    query = torch.zeros(BATCH, HEADS, 11, DIM, dtype=torch.float64)
    query[0, :, 2:11], query[1, :, :4] = tensors[0][0, :, 20:29], tensors[0][1, :, 3:7]
    plan = plan_reading([20, 3], [(2, 11), (0, 4)], ranges=[(0, 11)])
    found = attention(query, tensors[1], tensors[2], plan, window)
    torch.testing.assert_close(found[0, :, 2:11], expected[0, :, 20:29], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1, :, :4], expected[1, :, 3:7], rtol=1e-10, atol=1e-10)
    assert not found[0, :, :2].any() and not found[1, :, 4:].any()


@pytest.mark.parametrize("window", [None, 5])
def test_a_few_queries_at_once(window: int | None) -> None:
    tensors = drawn()
    expected = written_out(*tensors, window, starts_of([[], []]))
    query = torch.stack([tensors[0][0, :, 20:23], tensors[0][1, :, 3:6]])
    found = masked_attention.attend_at_places(
        query, tensors[1], tensors[2], places=[20, 3], window=window, scale=SCALE
    )
    torch.testing.assert_close(found[0], expected[0, :, 20:23], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], expected[1, :, 3:6], rtol=1e-10, atol=1e-10)


def test_the_module_attends_as_its_kernel_does() -> None:
    config = transformer_config(tiny_config(window=9), device_is_cuda=False)
    groups: Any = SimpleNamespace(cp=None)
    module = TorchAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    starts, tensors = starts_of(STARTS["two rows"]), drawn()
    plan = plan_attention(starts, batch=BATCH, ranges=WHOLE)
    layout = SequenceLayout(length=LENGTH, ranges=WHOLE, attention=plan)
    memory = [tensor.permute(2, 0, 1, 3) for tensor in tensors]
    found = module(*memory, None, packed_seq_params=layout)
    right = attend(*tensors, plan=plan, packed=(), window=9, scale=module.scale)
    torch.testing.assert_close(found, right.permute(2, 0, 1, 3).flatten(2), rtol=0, atol=0)


def test_who_attends() -> None:
    half = torch.empty(1, device="meta", dtype=torch.bfloat16)
    assert kernel_for(torch.empty(1)) is kernel_for(torch.empty(1).bfloat16()) is Kernel.BLOCKS
    assert kernel_for(half) is Kernel.VARLEN and kernel_for(half.float()) is Kernel.MASKED


def test_a_plan_in_words() -> None:
    plan = plan_attention(starts_of([[0, 9], [0, 9]]), batch=BATCH, ranges=[(4, 12), (20, 22)])
    both = slice(0, 2)
    assert plan.spans == (
        (Stretch(both, (0, 5), 4, 0), Stretch(both, (5, 8), 9, 9)),
        (Stretch(both, (8, 10), 20, 9),),
    )
    assert plan.blocks(3) is plan.blocks(3)  # made once
    assert plan_attention(None, batch=2, ranges=WHOLE).is_causal(LENGTH, None)
    assert not plan.is_causal(10, None)
    assert plan_attention(None, batch=2, ranges=WHOLE).is_causal(LENGTH, LENGTH)
    assert not plan_attention(None, batch=2, ranges=WHOLE).is_causal(LENGTH, LENGTH - 1)


def saved_bytes(length: int, window: int | None) -> int:
    """Memory that attention keeps for the backward, each storage once."""
    shapes = [(1, heads, length, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, [place * length // 20 for place in range(20)]] = True
    plan = plan_attention(starts, batch=1, ranges=[(0, length)])
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block_attention(*tensors, plan=plan, window=window, scale=SCALE)
    output.sum().backward()
    return sum(storages.values())


@pytest.mark.parametrize("window", [None, 100])
def test_memory_is_linear_in_the_tokens(window: int | None) -> None:
    small, large = (saved_bytes(length, window) for length in (1024, 4096))
    assert large == 4 * small
    assert small == 1024 * 4 * ((2 * HEADS + 2 * GROUPS) * DIM + HEADS)  # q, o, k, v; log-sums
