"""Streams, watchdog and a whole life of training on a CUDA device; see ``checks.py``."""

from pathlib import Path

import pytest
import torch

from megatron_ttt.fast_weights import Direction
from tests.end_to_end.lives import Run
from tests.gpu.checks import seconds_until_given_up, stream_scan_error, train_save_resume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Qwen3-0.6B's shape, vocabulary included, on the demo's bytes.
SHAPE = [
    "model.layers=28",
    "model.hidden_size=1024",
    "model.ffn_hidden_size=3072",
    "model.heads=16",
    "model.kv_groups=8",
    "model.head_dim=128",
    "model.vocab_size=151936",
    "model.max_positions=32768",
    "model.sliding_window=null",
    "ttt.layers=[5,11,17,23]",
    "ttt.chunk_size=1024",
    "ttt.eta=0.003",
    "train.seq_length=4096",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
]


@pytest.mark.parametrize("direction", Direction)
def test_streams_wait_for_each_other(direction: Direction) -> None:
    device = torch.device("cuda")
    error = stream_scan_error(device, direction, ranks=4, width=1 << 20, busy=2000)
    assert error < 1e-5


def test_the_watchdog_gives_up_a_kernel_that_does_not_end() -> None:
    finished = torch.cuda.Event()
    torch.cuda._sleep(1 << 33)  # some seconds of the device's clock
    finished.record()
    assert 0.3 < seconds_until_given_up(finished.query, timeout_s=0.3) < 1.5
    torch.cuda.synchronize()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_a_model_of_600_million_trains_saves_and_resumes(tmp_path: Path, backend: str) -> None:
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    rows = train_save_resume(Run(tmp_path / "run", [*SHAPE, f"model.attention={backend}"]))
    assert rows[-1]["loss"] < rows[0]["loss"]
