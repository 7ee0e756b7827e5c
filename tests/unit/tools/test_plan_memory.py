"""``tools/plan.py memory``: a table by part, whether it fits, and what would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ttt.benchmarks.memory_plan import GIB, fits, plan_memory
from megatron_ttt.config.devices import Device, device_named
from megatron_ttt.config.load import load_config
from megatron_ttt.config.memory import stage_parameters
from megatron_ttt.config.schema import Config
from tools.plan import main

WORDS = ["+model=qwen3_4b", "train.seq_length=8192", "ttt.chunk_size=1024"]


def configured(*words: str) -> Config:
    return load_config([*WORDS, *words, "run.dry_run=true", "train.precision=bf16"])


def test_parameters_of_published_models() -> None:
    """4.02 billion in Qwen3-4B (its model card), and what fast weights add to six layers."""
    plain = configured("ttt=off")
    assert stage_parameters(plain, 0) == 4_022_468_096
    added = 6 * (2560 * 2560 + 5 * 2560)
    assert stage_parameters(configured(), 0) == stage_parameters(plain, 0) + added
    stages = configured("parallel.pp=4", "parallel.tp=2")
    assert sum(stage_parameters(stages, stage) for stage in range(4)) > 4_022_468_096 // 2


def test_what_changes_memory_changes_its_part() -> None:
    (base,) = plan_memory(configured(), ranks=1)
    (full,) = plan_memory(configured("train.recompute=full"), ranks=1)
    (pieces,) = plan_memory(configured("train.loss_tokens=1024"), ranks=1)
    (shared,) = plan_memory(configured("train.global_batch_size=8"), ranks=8)
    assert full.activations < base.activations / 10 < full.recomputed * 4
    assert pieces.loss < base.loss / 4 and pieces.activations == base.activations
    assert shared.optimizer == base.optimizer // 8 and shared.weights == base.weights
    first, last = plan_memory(configured("parallel.pp=2"), ranks=2)
    assert first.activations == 2 * last.activations and first.loss == 0 < last.loss
    assert not fits([base], Device.h100)


def test_the_command_prints_and_advises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.json"
    assert main(["memory", *WORDS, "device=l40s", f"output={file}"]) == 1
    printed = capsys.readouterr().out
    (stage,) = json.loads(file.read_text())
    parts = [value for name, value in stage.items() if name != "stage"]
    assert f"does not fit l40s: {sum(parts) / GIB:.1f} of" in printed
    assert "train.recompute=full: " in printed and "parallel.tp=2 on 2 ranks: " in printed
    assert main(["memory", *WORDS, "parallel.tp=8", "device=b200"]) == 0
    assert "fits b200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("device=v100", "device=v100: did you mean h100? must be one of a100, h100, h200, "),
        ("documents=9000", "documents=9000: a row has 8192 tokens"),
        ("ranks=3", "world_size=3: "),
    ],
)
def test_mistakes_are_one_line(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *WORDS, "parallel.tp=2", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_devices_by_the_names_that_drivers_give() -> None:
    assert device_named("NVIDIA H200") is Device.h200 and device_named("unheard of") is None
