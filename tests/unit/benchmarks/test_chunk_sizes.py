"""The benchmark over chunk sizes: rounds, ratios, and no figure for a wrong result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.benchmarks import chunk_sizes as benchmark
from tools.benchmark import main

WORDS = ["chunk-sizes", "hidden=16", "ffn=32", "tokens=256", "sizes=[8,16]", "against=32"]


def test_every_size_is_measured_in_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sizes.json"
    assert main([*WORDS, "rounds=3", f"output={file}"]) == 0
    printed = capsys.readouterr().out
    assert "of chunk 32 (rounds)" in printed
    seconds = json.loads(file.read_text())["seconds"]
    assert {size: len(times) for size, times in seconds.items()} == {"32": 3, "8": 3, "16": 3}
    times = {int(size): values for size, values in seconds.items()}
    assert benchmark.ratios_of(times, 32, 32) == [1.0, 1.0, 1.0]


def test_groups_that_compute_something_else_are_no_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = benchmark.fast_weight_scan

    def wrong(*arguments: Any, group_chunks: int | None, **options: Any) -> Any:
        found = right(*arguments, group_chunks=group_chunks, **options)
        outputs_BTD = found.outputs_BTD * (1.001 if group_chunks is None else 1.0)
        return replace(found, outputs_BTD=outputs_BTD)

    monkeypatch.setattr(benchmark, "fast_weight_scan", wrong)
    assert main(WORDS) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: chunks of 32: groups differ from single chunks by 1.0e")
    assert not captured.out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("against=0", "against=0: must be at least 1"),
        ("device=tpu", "device=tpu: must be one of cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, word]) == 2
    assert capsys.readouterr().err.splitlines() == [message]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "device=cuda"]) == 2
    assert capsys.readouterr().err == "device=cuda: there is no GPU here; use cpu\n"
