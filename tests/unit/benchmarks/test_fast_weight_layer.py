"""The layer benchmark: it measures the right thing, refuses wrong results, and reports mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ttt.benchmarks import fast_weight_layer as benchmark
from tools.benchmark import main

SMALL = benchmark.LayerProblem(hidden=16, ffn=32, tokens=256, chunk=16, repeats=2)
OPTIONS = [f"{name}={getattr(SMALL, name)}" for name in ("hidden", "ffn", "tokens", "chunk")]


@pytest.mark.parametrize("part", list(benchmark.Part))
def test_variants_agree_and_the_fast_weight_is_alive(part: str) -> None:
    layer = benchmark._Layer(replace(SMALL, dtype="fp64", part=part))
    assert benchmark.largest_difference(layer) < 1e-12
    ours, _, dense = (layer.run(variant) for variant in benchmark.VARIANTS)
    relative = (ours[0] - dense[0]).norm() / dense[0].norm()
    assert 0.05 < relative < 0.3


def test_memory_grows_with_the_chunks_only_where_matrices_are_kept() -> None:
    """Twice the chunks: the materialising formulation holds twice the matrices, ours one state."""
    fine, coarse = (
        {m.name: m for m in benchmark.measure(replace(SMALL, chunk=chunk))[0]} for chunk in (4, 8)
    )
    kept = fine["materialising"].extra_bytes - coarse["materialising"].extra_bytes
    assert kept >= 2 * (64 - 32) * SMALL.matrix_bytes
    assert fine["fast weight"].extra_bytes < 1.2 * coarse["fast weight"].extra_bytes
    assert fine["dense"].extra_bytes == 0
    assert fine["dense"].peak_bytes >= 256 * (16 + 32) * 4  # outputs and the keys' gradient


def test_different_results_are_no_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, *others = benchmark.VARIANTS
    wrong = replace(ours, forward=lambda *arguments: 1.001 * ours.forward(*arguments))
    monkeypatch.setattr(benchmark, "VARIANTS", (wrong, *others))
    assert main(["fast-weight-layer", *OPTIONS]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: variants differ by 1.0e-03")
    assert not captured.out


def test_report_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layer.json"
    assert main(["fast-weight-layer", *OPTIONS, "repeats=2", f"output={file}"]) == 0
    printed = capsys.readouterr().out
    assert "fast weight" in printed and "materialising takes" in printed
    record = json.loads(file.read_text())
    assert [len(variant["seconds"]) for variant in record["variants"]] == [2, 2, 2]
    ours, materialising, _ = record["variants"]
    best = min(materialising["seconds"]) / min(ours["seconds"])
    assert record["times_ours"]["materialising"]["best"] == pytest.approx(best)
    assert record["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fast-weight-layer", "chunk=100"], "8192 tokens are not whole chunks of 100"),
        (["fast-weight-layer", "hidden=0"], "hidden=0: must be at least 1"),
        (["fast-weight-layer", "part=all"], "part all is none of projection, mlp"),
        (["fast-weight-layer", "dtype=fp8"], "dtype fp8 is none of fp32, bf16, fp64"),
        (["fast-weight-layer", "device=tpu"], "device tpu is neither cpu nor cuda"),
        (
            ["fast-weight-layer", "output=/no/such/place.json"],
            "place.json: there is no such folder",
        ),
        (["fast-weight-layer", "tokens=many"], "tokens=many: must be an integer"),
        (["sorcery"], "COMMAND=sorcery: must be given first, one of fast-weight-layer, "),
        ([], "COMMAND=???: must be given first"),
    ],
)
def test_mistakes_take_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
