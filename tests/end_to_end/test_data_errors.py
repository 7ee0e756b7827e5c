"""Damaged or unfit data ends the training program with one line and status 2, nothing written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.lives import Run
from tests.unit.data.helpers import write_dataset


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
    ("damage", "said"),
    [(truncate, "bytes"), (beyond_the_vocabulary, "vocab")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_unfit_data(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    prefix = tmp_path / "corpus"
    damage(prefix)
    words = ["data=files", "data.tokenizer.kind=bytes", f"data.path={prefix}"]
    run = Run(tmp_path / "run", [*words, f"data.cache_dir={tmp_path / 'cache'}"])
    life = run.start()
    assert life.wait() == 2, life.text
    (line,) = life.text.strip().splitlines()
    assert line.startswith(f"data.path={prefix}: ") and said in line
    assert not run.folder.exists()
