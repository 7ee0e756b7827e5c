"""The attention benchmark: every length in every round, and no figure for a wrong result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.benchmarks import attention as benchmark
from tools.benchmark import main

WORDS = ["attention", "tokens=[48,96]", "documents=5", "heads=4", "groups=2", "head_dim=8"]


@pytest.mark.parametrize("window", [0, 7])
def test_every_length_is_measured_in_every_round(
    window: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "attention.json"
    assert main([*WORDS, "rounds=2", f"window={window}", f"output={file}"]) == 0
    assert "masks / ours" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], len(row["ours"]), len(row["masks"])) for row in rows] == [
        (48, 2, 2),
        (96, 2, 2),
    ]
    assert all(0 < row["ours_bytes"] < row["masks_bytes"] for row in rows)


def test_wrong_attention_is_no_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = benchmark.attend

    def wrong(*tensors: Any, **options: Any) -> Any:
        return right(*tensors, **options) * 1.001

    monkeypatch.setattr(benchmark, "attend", wrong)
    assert main(WORDS) == 1
    captured = capsys.readouterr()
    assert "error: 48 tokens: outputs or gradients differ by 1.0e-03" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("groups=3", "groups=3: must divide heads=4 evenly"),
        ("documents=50", "documents=50: a row has 48 tokens"),
        ("window=-1", "window=-1: must be at least 0"),
    ],
)
def test_mistakes_are_one_line(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, word]) == 2
    assert capsys.readouterr().err.splitlines() == [message]
