"""The trial runs to its end without a GPU, so that it does not fail on the day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.fast_weights.labels import Label
from megatron_ttt.trial.words import StageName

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage at toy size."""
    folder = tmp_path_factory.mktemp("trial") / "output"
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "tools/gpu_trial.py", "size=toy", "device=cpu", f"output={folder}"]
    return subprocess.run([*program, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def record(folder: Path, stage: StageName) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{stage.value}.json").read_text())
    return found


@pytest.mark.parametrize("stage", StageName)
def test_every_stage_is_done(folder: Path, stage: StageName) -> None:
    found = record(folder, stage)
    assert (found["status"], found["reason"]) == ("done", "")
    assert found["cells"]
    rows = (folder / "table.md").read_text().splitlines()
    assert sum(row.startswith(f"| {stage.value} |") for row in rows) == len(found["cells"])


def test_fast_weights_are_alive_and_gradients_agree(folder: Path) -> None:
    (cell,) = record(folder, StageName.gradients)["cells"]
    assert cell["values"]["difference"] < 1e-6
    moved = float(cell["figure"].rpartition(" ")[2])
    assert moved > 1e-3


def test_the_profile_names_the_parts(folder: Path) -> None:
    trace, *cells = record(folder, StageName.profile)["cells"]
    names = {
        event.get("name") for event in json.loads(Path(trace["figure"]).read_text())["traceEvents"]
    }
    assert {Label.PRODUCTS.value, Label.ATTENTION.value} <= names
    assert [cell["case"] for cell in cells] == [label.value for label in Label]
    assert cells[1]["figure"] == "did not happen: one rank needs no scan"


def test_nothing_is_run_twice(folder: Path) -> None:
    before = {stage: record(folder, stage) for stage in StageName}
    done = run(folder, "stages=[versions,layer]")
    assert done.returncode == 0 and done.stdout.count("done before") == 2
    assert {stage: record(folder, stage) for stage in StageName} == before
