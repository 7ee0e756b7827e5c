"""What a step launches, moves, waits for and keeps, with bounds that fail when it grows.

Shapes of Qwen3-4B with two layers, the first one fast: counts of a layer do not depend on how many
there are. A bound that a change lowers is lowered with it.
"""

import pytest

from megatron_ttt.benchmarks.counted_step import count_step
from megatron_ttt.benchmarks.device_counter import Counts, Phase
from tests.fake_device import shaped

SHAPE = ["+model=qwen3_4b", "train.seq_length=8192", "ttt.chunk_size=1024", "ttt.layers=[0]"]


def counted(*words: str, documents: int = 1) -> tuple[Counts, Counts]:
    counter = count_step(shaped([*SHAPE, *words]), documents=documents)
    return counter.total(Phase.FORWARD), counter.total(Phase.BACKWARD)


def test_one_document() -> None:
    forward, backward = counted("data.reset_attention=false")
    assert forward.kernels <= 177 and backward.kernels <= 213
    assert forward.bytes <= 78.6e9 and backward.bytes <= 76.5e9
    assert (forward + backward).syncs == 0
    assert forward.uploads <= 8 and (forward + backward).pageable == 0
    assert forward.host_operations <= 55 and backward.host_operations == 0  # the layout's alone
    assert forward.saved_bytes <= 7.26e9


def test_off_launches_less_and_waits_for_nothing() -> None:
    forward, backward = counted("data.reset_attention=false")
    plain, plain_backward = counted("data.reset_attention=false", "ttt=off")
    assert plain.kernels < forward.kernels and plain_backward.kernels < backward.kernels
    assert plain.syncs == plain_backward.syncs == 0


@pytest.mark.parametrize("words", [["ttt.write.kind=gated"], ["ttt.write.kind=bounded"]])
def test_other_write_rules_wait_for_nothing(words: list[str]) -> None:
    forward, backward = counted("data.reset_attention=false", *words)
    assert (forward + backward).syncs == 0 and (forward + backward).pageable == 0


def test_documents_wait_for_nothing() -> None:
    forward, backward = counted(documents=8)
    assert (forward + backward).syncs == 0 and (forward + backward).pageable == 0
