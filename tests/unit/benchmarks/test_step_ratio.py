"""The benchmark of a step with fast weights on and off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmark import main

WORDS = ["step", "model=micro", "train.seq_length=128", "ttt.chunk_size=32"]


def test_both_train_in_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    assert main([*WORDS, "rounds=2", f"output={file}"]) == 0
    record = json.loads(file.read_text())
    assert len(record["on"]) == len(record["off"]) == 2
    assert record["operations"] > 1
    assert f"by operations {record['operations']:.3f}" in capsys.readouterr().out


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "train.seq_length=0"]) == 2
    assert capsys.readouterr().err.startswith("train.seq_length=0: must be at least 1")
