"""What attention, its cache and the gather of sequences ask of the host while a device works.

Meta tensors stand for those on a GPU, CPU tensors for the host's memory.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ttt.benchmarks.device_counter import META, DeviceCounter, DeviceStandIns
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.fast_weights.documents import plan_chunks
from megatron_ttt.inference.key_value_cache import KeyValueCache
from megatron_ttt.inference.token_runs import TokenRuns
from megatron_ttt.model.attention import TorchAttention
from megatron_ttt.model.attention_plan import plan_attention
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.model.varlen_attention import PackedSpan, pack
from megatron_ttt.parallel.collectives import gather_sequences
from megatron_ttt.parallel.layout import token_ranges
from megatron_ttt.scan_words import SequenceOrder
from tests.distributed.training_runs import tiny_config
from tests.fake_device import fake_group

LENGTH, BATCH, HEADS, GROUPS, DIM = 1200, 2, 4, 2, 12


def on_device(*shape: int) -> Tensor:
    return torch.empty(*shape, device=META, dtype=torch.bfloat16, requires_grad=True)


def query_key_value(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (on_device(length, BATCH, n, DIM) for n in (HEADS, GROUPS, GROUPS))
    return query, key, value


def assert_host_is_free(counter: DeviceCounter) -> None:
    total = counter.total()
    assert total.kernels > 0
    assert (total.host_operations, total.uploads, total.syncs) == (0, 0, 0)


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "ranges", [[(0, LENGTH)], [(300, 600), (600, 900)]], ids=["whole", "spans"]
)
def test_attention_asks_nothing_of_the_host(
    ranges: list[tuple[int, int]], window: int | None, by_document: bool
) -> None:
    config = transformer_config(tiny_config(window=window), device_is_cuda=False)
    groups: Any = SimpleNamespace(cp=None)
    module = TorchAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[0, [0, 200, 650]] = True
    plan = plan_attention(starts if by_document else None, batch=BATCH, ranges=ranges)
    packed = tuple(_on_device(span) for span in pack(plan, torch.device("cpu")))
    layout = SequenceLayout(length=LENGTH, ranges=ranges, attention=plan, packed=packed)
    tensors = query_key_value()
    with DeviceCounter(outside="attention") as counter, DeviceStandIns(counter):
        module(*tensors, None, packed_seq_params=layout).sum().backward()
    assert_host_is_free(counter)
    assert all(tensor.grad is not None for tensor in tensors)
    # gathers of two rows' keys, two kernels a run of tokens, sums of gradients: never a mask
    assert counter.total().bytes < 40 * BATCH * LENGTH * (HEADS + GROUPS) * DIM * 2


def _on_device(span: PackedSpan) -> PackedSpan:
    ends = (torch.empty_like(e, device=META) for e in (span.query_ends, span.key_ends))
    return replace(span, query_ends=next(ends), key_ends=next(ends))


def test_whole_causal_rows_need_no_mask() -> None:
    config = transformer_config(tiny_config(window=None), device_is_cuda=False)
    groups: Any = SimpleNamespace(cp=None)
    module = TorchAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    plan = plan_attention(None, batch=BATCH, ranges=[(0, LENGTH)])
    layout = SequenceLayout(length=LENGTH, ranges=[(0, LENGTH)], attention=plan)
    with DeviceCounter(outside="attention") as counter, DeviceStandIns(counter):
        module(*query_key_value(), None, packed_seq_params=layout)
    assert counter.total().kernels <= 2  # the fused kernel; making its output contiguous


@pytest.mark.parametrize("counts", [(700, 700), (700, 650)], ids=["alike", "ragged"])
def test_the_cache_attends_on_the_device(counts: tuple[int, int]) -> None:
    cache = KeyValueCache(batch=BATCH)
    with torch.no_grad(), DeviceCounter(outside="cache") as counter, DeviceStandIns(counter):
        for length, real in ((700, counts), (3, (3, 3)), (1, (1, 1))):
            query, key, value = (t.transpose(0, 1) for t in query_key_value(length))
            runs = TokenRuns((0, 0), real, length)
            cache.attend(query, key, value, runs, window=None, scale=0.3)
    assert_host_is_free(counter)


@pytest.mark.parametrize("order", SequenceOrder)
def test_gathered_sequences_are_ordered_without_an_index(order: SequenceOrder) -> None:
    with fake_group(ranks=4) as group:
        tensors = query_key_value(LENGTH // 4)
        with DeviceCounter(outside="gather") as counter:
            for whole in gather_sequences(*tensors, group=group, order=order):
                assert whole.shape[0] == LENGTH
                whole.sum().backward()
    assert_host_is_free(counter)


def test_a_plan_travels_without_waiting() -> None:
    starts = torch.zeros(2, 64, dtype=torch.bool)
    starts[:, [0, 20]] = True
    padding = torch.zeros_like(starts)
    padding[0, 60:] = True
    counter = DeviceCounter(outside="plan")
    with DeviceStandIns(counter), counter:
        plan = plan_chunks(
            starts, batch=2, length=64, chunk_size=8, padding_BT=padding, device=META
        )
        plan.select_tokens(token_ranges(0, 2, SequenceOrder.zigzag, 64))
    total = counter.total()
    assert total.uploads == 5
    assert (total.pageable, total.syncs) == (0, 0)
