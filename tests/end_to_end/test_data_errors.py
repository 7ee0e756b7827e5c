"""Damaged or unfit data ends the training program with one line and status 2, nothing written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.helpers import write_dataset

ROOT = Path(__file__).parents[2]


def write(prefix: Path, *, highest: int) -> None:
    tokens = np.arange(4000) % highest
    write_dataset(prefix, [document.tolist() for document in np.split(tokens, 4)])


def truncate(prefix: Path) -> None:
    write(prefix, highest=250)
    file = prefix.with_suffix(".bin")
    file.write_bytes(file.read_bytes()[:-10])


def beyond_the_vocabulary(prefix: Path) -> None:
    write(prefix, highest=600)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "bytes"), (beyond_the_vocabulary, "vocab")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_unfit_data(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    prefix, run = tmp_path / "corpus", tmp_path / "run"
    damage(prefix)
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "+model=tiny", "data=files"]
    command += ["data.tokenizer.kind=bytes", f"data.path={prefix}", f"run.dir={run}"]
    command += [f"data.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"data.path={prefix}: ") and words in line
    assert done.stdout == "" and not run.exists()
