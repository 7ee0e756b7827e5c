"""A task of one's own is one file: written beside the others, it runs through the program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.unit.hf.models import live_model

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS = '''
"""How likely the model finds one token over and over."""

from dataclasses import dataclass

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.evaluation.report import MODE_NAMES, Report, Table
from megatron_ttt.evaluation.task import Reading, Task, Text


@dataclass
class RepeatConfig:
    """A row of one token."""

    length: int = 16  # tokens of the row
    token: int = 65


def row_lengths(source, settings):
    return {"repeat.length": [settings.length]}


def run(subject, settings, config):
    """Report the probability of the token behind the row."""
    found = {}
    for mode in subject.modes:
        session = subject.new_session(mode, batch=1)
        logits = session.read([[settings.token] * settings.length])
        found[mode] = float(logits[0].float().softmax(-1).flatten()[settings.token])
    columns = [(MODE_NAMES[mode], ".6f") for mode in found]
    table = Table("Probability of one token more", columns, [list(found.values())])
    return Report([table], {mode.value: value for mode, value in found.items()})


TASK = Task(
    settings=RepeatConfig,
    reading=Reading.SESSION,
    text=Text.RANDOM,
    lengths=row_lengths,
    run=run,
    bounds={"length": COUNT, "token": COUNT},
)
'''


def start(copy: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(copy / "tools" / "evaluate.py"), "task=repeat", *words],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(path or copy)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_file_adds_a_task(tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    for folder in ("megatron_ttt", "configs", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=ignored)
    (copy / "megatron_ttt" / "evaluation" / "tasks" / "repeat.py").write_text(TOKENS)
    model = tmp_path / "exported"
    live_model(dtype=torch.float32, vocab_size=258).save_pretrained(model)

    no_torch = tmp_path / "no_torch"
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    wrong = start(copy, f"checkpoint=hf:{model}", "repeat.length=0", path=no_torch)
    assert (wrong.returncode, wrong.stderr) == (2, "repeat.length=0: must be at least 1\n")
    idle = "speed.repeats=3"
    done = start(copy, f"checkpoint=hf:{model}", "repeat.length=40", "output=out", idle)
    assert done.returncode == 0, done.stderr
    assert "notice: speed.repeats has no effect with task=repeat" in done.stderr
    found = json.loads((copy / "out" / "repeat.json").read_text())
    assert found["task"] == "repeat" and found["evaluation"]["repeat"]["length"] == 40
    assert f"{found['in_place']:.6f}" in done.stdout and f"{found['off']:.6f}" in done.stdout
    assert abs(found["in_place"] - found["off"]) > 1e-6
