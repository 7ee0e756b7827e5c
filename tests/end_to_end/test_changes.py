"""A run that goes on with other settings loses no sample, repeats none, and says what changed."""

import json
import math
from pathlib import Path

import pytest

from tests.end_to_end.lives import Run

SWITCH = 8  # steps of the first run, four samples each
ROWS = 128


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of eight steps, which is to be continued by others."""
    run = Run(tmp_path_factory.mktemp("first") / "run", ["train.steps=8", "checkpoint.interval=4"])
    run.complete()
    lrs = [row["lr"] for row in run.rows()]
    assert lrs == pytest.approx([lr_at(4 * step, 32) for step in range(SWITCH)])
    assert lrs[0] == 0.002, "the first step was made with the full rate: there is no warm-up"
    return run.checkpoints / "step_00000008"


def lr_at(samples: int, total: int, highest: float = 0.002, lowest: float = 0.0002) -> float:
    """A cosine, by what was consumed before the step."""
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * samples / total))


@pytest.mark.parametrize(("batch", "steps"), [(8, 12), (2, 14)])
def test_another_batch_size_goes_on_where_the_first_stopped(
    first: Path, tmp_path: Path, batch: int, steps: int
) -> None:
    changes = [f"run.resume={first}", f"train.global_batch_size={batch}", f"train.steps={steps}"]
    run = Run(tmp_path / "run", [*changes, "optimizer.lr=0.004", "checkpoint.interval=2"])
    life = run.start()
    life.when(lambda: (run.checkpoints / "step_00000010").exists() and run.steps() >= 3)
    life.kill()
    text = life.text + run.complete()
    assert f"changed since {first}: optimizer.lr 0.002 then, 0.004 now" in text
    assert f"train.global_batch_size 4 then, {batch} now" in text
    total = 32 + batch * (steps - SWITCH)
    samples = run.samples()
    seen = [number for step in sorted(samples) for number in samples[step]]
    assert seen == list(range(32, total))
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(SWITCH + 1, steps + 1))
    for done, row in enumerate(rows):
        assert row["consumed_tokens"] == ROWS * (32 + batch * (done + 1))
        assert row["lr"] == pytest.approx(lr_at(32 + batch * done, total, highest=0.004))
    manifest = json.loads((run.checkpoints / f"step_{steps:08d}" / "manifest.json").read_text())
    assert manifest["progress"]["consumed_samples"] == total
    assert manifest["progress"]["batches"] == [[SWITCH, 4], [steps - SWITCH, batch]]


def test_other_data_is_refused_or_accepted_by_name(first: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", [f"run.resume={first}", "train.seed=5", "train.steps=9"])
    life = run.start()
    assert life.wait() == 2
    (line,) = life.text.splitlines()
    assert line.startswith("data.changed=refuse: ") and "train.seed 1234 then, 5 now" in line
    assert not run.folder.exists()
    text = run.complete("data.changed=accept")
    assert "going on at sample 32 of the new order" in text
    assert run.samples() == {9: [32, 33, 34, 35]}


def test_a_run_that_is_past_its_end_is_one_line(first: Path, tmp_path: Path) -> None:
    life = Run(tmp_path / "run", [f"run.resume={first}", "train.steps=7"]).start()
    assert life.wait() == 2
    assert life.text.startswith("train.steps=7: ") and "has 8 steps already" in life.text
