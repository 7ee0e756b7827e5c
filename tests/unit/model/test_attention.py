"""The torch attention against attention written out, with documents, windows and grouped heads."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.model import windowed_attention
from megatron_ttt.model.attention import TorchAttention
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.model.windowed_attention import blocks
from tests.distributed.training_runs import tiny_config

LENGTH, BATCH, HEADS, GROUPS, DIM = 37, 2, 4, 2, 12


def written_out(
    query: Tensor, key: Tensor, value: Tensor, window: int, documents: Tensor
) -> Tensor:
    """Softmax attention token by token: ``[T, B, A, E]`` -> ``[T, B, A * E]``."""
    outputs = torch.zeros(LENGTH, BATCH, HEADS, DIM, dtype=query.dtype)
    for row in range(BATCH):
        for place in range(LENGTH):
            seen = [
                other
                for other in range(max(0, place - window + 1), place + 1)
                if documents[row, other] == documents[row, place]
            ]
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = key[seen, row, group] @ query[place, row, head] / DIM**0.5
                outputs[place, row, head] = scores.softmax(0) @ value[seen, row, group]
    return outputs.flatten(2)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("by_document", [False, True])
def test_attention_equals_attention_written_out(
    monkeypatch: pytest.MonkeyPatch, window: int | None, by_document: bool
) -> None:
    monkeypatch.setattr(
        windowed_attention, "LARGEST_BLOCK", 8
    )  # several blocks, the last one unfinished
    config = transformer_config(tiny_config(window=window), device_is_cuda=False)
    groups: Any = SimpleNamespace(cp=None)
    module = TorchAttention(replace(config), 1, AttnMaskType.causal, "self", pg_collection=groups)
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH, BATCH, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]
    documents = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    if by_document:
        documents[0, 8:] += 1
        documents[0, 21:] += 1
        documents[1, 30:] += 1
    layout = SequenceLayout(
        length=LENGTH, ranges=[(0, LENGTH)], documents=documents if by_document else None
    )
    found = module(*inputs, None, packed_seq_params=layout)
    expected = written_out(*inputs, window or LENGTH, documents)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for mine, right in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_blocks_cover_a_range_once() -> None:
    assert list(blocks(3, 20, 8)) == [(3, 11), (11, 19), (19, 20)]
    assert list(blocks(3, 3, 8)) == []
