"""``tools/plan.py scan``: the table and the plot of the cost model, from a configuration."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ttt.benchmarks.scan_plan import plan_rows, state_bytes, unit_seconds
from megatron_ttt.config.load import load_config
from megatron_ttt.config.schema import Config
from megatron_ttt.parallel.cost import GPU_CLUSTER
from megatron_ttt.scan_words import ScanAlgorithm

ROOT = Path(__file__).resolve().parents[3]
OVERRIDES = ["+model=qwen3_8b", "parallel.cp=8", "train.seq_length=32768"]


def configuration(*overrides: str) -> Config:
    return load_config([*OVERRIDES, *overrides, "run.dry_run=true"])


def test_rows_of_qwen3_8b() -> None:
    config = configuration()
    assert state_bytes(config) == 4096 * 12288 * 4
    assert unit_seconds(config, 1e12) == pytest.approx(2 * 4096 * 4096 * 12288 / 1e12)
    rows = plan_rows(config, GPU_CLUSTER, flops=4e14)
    assert [row.ranks for row in rows] == [2**power for power in range(1, 13)]
    assert [row.sequence for row in rows][:3] == [8192, 16384, 32768]
    for row in rows:
        assert row.chosen.seconds == min(p.seconds for p in row.predictions.values())
        assert 0 <= row.exposed_s <= row.seconds
        assert row.step_exposed_s == pytest.approx(row.exposed_s * 6 * 8)
    slow = plan_rows(config, GPU_CLUSTER, flops=1e12)
    assert slow[0].exposed_s == 0  # slow devices hide everything


def test_a_named_algorithm_is_kept() -> None:
    rows = plan_rows(configuration("parallel.scan=doubling"), GPU_CLUSTER, flops=4e14, ranks=(16,))
    assert rows[0].chosen.algorithm is ScanAlgorithm.doubling


def test_without_fast_weights_there_is_no_scan() -> None:
    with pytest.raises(ValueError, match=r"ttt\.mode = off"):
        plan_rows(configuration("ttt=off"), GPU_CLUSTER, flops=4e14)


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "scan.png"
    command = [sys.executable, "tools/plan.py", "scan", *OVERRIDES, f"plot={plot}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ring" in done.stdout and "4096" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    command += ["parallel.scan_constants=absent.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "absent.json" in done.stderr and "Traceback" not in done.stderr
