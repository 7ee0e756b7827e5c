"""What a step launches, moves, waits for and keeps, with bounds that fail when it grows.

Shapes of Qwen3-4B with two layers, the first one fast: counts of a layer do not depend on how many
there are. A bound that a change lowers is lowered with it.
"""

import pytest
import torch

from megatron_ttt.benchmarks.counted_step import count_step
from megatron_ttt.benchmarks.device_counter import Counts, DeviceCounter, Phase
from megatron_ttt.fast_weights import Write, fast_weight_scan, plan_chunks
from tests.fake_device import shaped

SHAPE = ["+model=qwen3_4b", "train.seq_length=8192", "ttt.chunk_size=1024", "ttt.layers=[0]"]


def counted(*words: str, documents: int = 1) -> tuple[Counts, Counts]:
    counter = count_step(shaped([*SHAPE, *words]), documents=documents)
    return counter.total(Phase.FORWARD), counter.total(Phase.BACKWARD)


def test_one_document() -> None:
    forward, backward = counted("data.reset_attention=false")
    # Megatron's SwiGLU, one kernel on a GPU, is counted in its parts: 7 more in the backward
    assert forward.kernels <= 166 and backward.kernels <= 205 + 7
    assert forward.bytes <= 75.7e9 and backward.bytes <= 75.2e9
    assert (forward + backward).syncs == 0
    assert forward.uploads <= 8 and (forward + backward).pageable == 0
    assert forward.host_operations <= 55 and backward.host_operations == 0  # the layout's alone
    assert forward.saved_bytes <= 7.10e9


def test_a_loss_in_pieces_keeps_no_logits() -> None:
    """Every piece's are made again: one more product of the output layer."""
    whole, whole_backward = counted("data.reset_attention=false")
    forward, backward = counted("data.reset_attention=false", "train.loss_tokens=4096")
    logits = 8192 * 151936 * 4  # bytes of the softmax, fp32
    assert whole.saved_bytes - forward.saved_bytes >= 0.95 * logits
    assert forward.flops == whole.flops
    assert backward.flops - whole_backward.flops == 2 * 8192 * 2560 * 151936
    assert (forward + backward).syncs == 0


def test_off_launches_less_and_waits_for_nothing() -> None:
    forward, backward = counted("data.reset_attention=false")
    plain, plain_backward = counted("data.reset_attention=false", "ttt=off")
    assert plain.kernels < forward.kernels and plain_backward.kernels < backward.kernels
    assert plain.syncs == plain_backward.syncs == 0


@pytest.mark.parametrize("words", [["ttt.write.kind=gated"], ["ttt.write.kind=bounded"]])
def test_other_write_rules_wait_for_nothing(words: list[str]) -> None:
    forward, backward = counted("data.reset_attention=false", *words)
    assert (forward + backward).syncs == 0 and (forward + backward).pageable == 0


def test_documents_cost_no_masks() -> None:
    """One more upload, and a few kernels: what is kept and moved does not grow."""
    forward, backward = counted(documents=8)
    plain, plain_backward = counted("data.reset_attention=false")
    assert (forward + backward).syncs == 0 and (forward + backward).pageable == 0
    assert forward.uploads <= 9
    assert forward.kernels <= plain.kernels and backward.kernels <= plain_backward.kernels + 30
    assert forward.saved_bytes <= plain.saved_bytes + 1e6
    assert forward.bytes <= plain.bytes and backward.bytes <= 1.02 * plain_backward.bytes
    assert forward.flops < 0.9 * plain.flops  # of another document nothing is multiplied


def launches(chunk: int, documents: int) -> int:
    """Kernels of one projection's forward and backward over 8192 tokens, on a GPU's paths."""
    length, hidden, ffn = 8192, 2560, 9728
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, [i * length // documents + 3 * (i > 0) for i in range(documents)]] = True
    plan = plan_chunks(starts, batch=1, length=length, chunk_size=chunk, device="cpu")
    sizes = [(1, length, ffn), (1, length, hidden), (hidden, ffn)]
    keys, targets, weight = (
        torch.empty(size, device="meta", dtype=torch.bfloat16, requires_grad=True) for size in sizes
    )
    with DeviceCounter(outside="layer") as counter:
        output = fast_weight_scan(keys, Write(targets), weight, plan=plan, eta=0.1)
        output.outputs_BTD.backward(torch.empty_like(output.outputs_BTD))
    counts = counter.total()
    assert counts.syncs == 0 and counts.pageable == 0
    return counts.kernels


@pytest.mark.parametrize("chunk", [8, 64, 256, 512, 1024])
def test_launches_of_a_layer_do_not_grow_with_its_chunks(chunk: int) -> None:
    found = [launches(chunk, documents) for documents in (1, 20)]
    assert found[0] <= 320 and found[1] <= 3 * 320, found
