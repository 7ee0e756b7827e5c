"""Killed and started again, a run is the run that was never killed.

Compared are the fields of ``metrics.jsonl`` that do not depend on the clock, byte for byte, and
the sample numbers of every step.

    MEGATRON_TTT_KILLS=20 pytest tests/end_to_end/test_resume.py -k middle   # more random moments
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ttt.checkpoints.manifest import read_manifest
from megatron_ttt.checkpoints.run_files import complete_folders
from megatron_ttt.training.resilience import STOPPED
from tests.end_to_end.lives import STEPS, TINY, Run, every_sample_once

REPOSITORY = Path(__file__).resolve().parents[2]
LOSS_BOUND, NORM_BOUND, RATIO_BOUND = 2e-5, 5e-4, 1e-3


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps without interruption, started as a user starts them."""
    run = Run(tmp_path_factory.mktemp("straight") / "run")
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", *TINY, f"run.dir={run.folder}"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    ratios = [row[key] for row in run.rows() for key in row if key.startswith("ttt/")]
    assert 0.05 < max(ratios) < 0.5, f"fast weights not alive: {ratios}"
    assert len(run.rows()) == STEPS
    return run


def check_equal(run: Run, straight: Run) -> None:
    found = [json.dumps(row) for row in run.rows()]
    assert found == [json.dumps(row) for row in straight.rows()]
    assert run.samples() == straight.samples() == every_sample_once()


@pytest.mark.parametrize("mode", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
def test_killed_between_checkpoints(straight: Run, tmp_path: Path, mode: str) -> None:
    run = Run(tmp_path / "run", [mode])
    life = run.start()
    life.when(lambda: run.steps() >= 13 and (run.checkpoints / "latest").exists())
    life.kill()
    assert "step_00000010 at step 10" in run.complete()
    check_equal(run, straight)


def test_killed_in_the_middle_of_saves(straight: Run, tmp_path: Path) -> None:
    """Each life ends somewhere inside a save or just after it; saving modes take turns."""
    kills = int(os.environ.get("MEGATRON_TTT_KILLS", "4"))
    chance = random.Random(7)
    run = Run(tmp_path / "run", ["checkpoint.interval=1", "checkpoint.keep_last=3"])
    halves = 0
    for number in range(kills):
        life = run.start(f"checkpoint.async_save={'true' if number % 2 else 'false'}")
        life.when(run.saving)
        time.sleep(chance.uniform(0, 0.1) if number else 0)
        life.kill()
        halves += run.saving()
    assert halves > 0, "no kill came in the middle of a save"
    run.complete()
    check_equal(run, straight)
    assert not run.saving(), "leftovers of killed saves"
    assert len(list(run.checkpoints.glob("step_*"))) == 3


BY_BUCKET = ["checkpoint.periodic=dp_reshardable"]
LAYOUTS = [
    (2, ["parallel.tp=2"], 2, ["parallel.pp=2"]),
    (1, BY_BUCKET, 2, BY_BUCKET),  # data-parallel size 1 to 2
    (1, [], 2, ["parallel.cp=2"]),
]


@pytest.mark.parametrize(("ranks", "before", "more_ranks", "after"), LAYOUTS, ids=str)
def test_killed_and_started_at_another_layout(
    straight: Run,
    tmp_path: Path,
    ranks: int,
    before: list[str],
    more_ranks: int,
    after: list[str],
) -> None:
    run = Run(tmp_path / "run")
    life = run.start(*before, ranks=ranks)
    life.when(lambda: run.steps() >= 12 and (run.checkpoints / "latest").exists())
    life.kill()
    assert "at step 10" in run.complete(*after, ranks=more_ranks)
    assert run.samples() == every_sample_once()
    forms = [
        read_manifest(run.checkpoints / f"step_{step:08d}").facts["optimizer"]["form"]
        for step in (10, 20)
    ]
    full = "fully_reshardable"
    assert forms == ["dp_reshardable" if before == BY_BUCKET else full, full]  # the last: at any
    for row, expected in zip(run.rows(), straight.rows(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=LOSS_BOUND)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM_BOUND)
        for key in ("step", "lr", "consumed_tokens"):
            assert row[key] == expected[key]
        for key in (key for key in expected if key.startswith("ttt/")):
            assert row[key] == pytest.approx(expected[key], rel=RATIO_BOUND, abs=1e-6)


def test_asked_to_stop(straight: Run, tmp_path: Path) -> None:
    """SIGTERM to every process, twice, as Slurm and torchrun send it: one request."""
    run = Run(tmp_path / "run", ["checkpoint.async_save=true", "data.workers=1"])
    life = run.start()
    life.when(lambda: run.steps() >= 4)
    for _ in range(2):
        os.killpg(life.processes[0].pid or 0, signal.SIGTERM)
    assert life.wait() == STOPPED, life.text
    done = run.steps()
    assert 4 <= done < STEPS
    assert f"saved {run.checkpoints}/step_{done:08d}" in life.text
    assert f"at step {done}" in run.complete()
    check_equal(run, straight)


def test_a_full_disk_stops_the_run_in_one_line(tmp_path: Path) -> None:
    """In either mode the run ends with status 1, and the good checkpoint is used next time."""
    run = Run(tmp_path / "run", ["checkpoint.interval=5"])
    life = run.start("train.steps=5")
    assert life.wait() == 0, life.text
    for mode in ("checkpoint.async_save=false", "checkpoint.async_save=true"):
        life = run.start(mode, largest_file=100_000)
        assert life.wait() == 1, life.text
        last = life.text.splitlines()[-1]
        assert "checkpoint of step 10 not saved" in last and "File too large" in last
        assert "Traceback" not in life.text and "saved " not in life.text.replace("not saved", "")
        assert [path.name for path in run.checkpoints.glob("step_*")] == ["step_00000005"]
    assert "step_00000005 at step 5" in run.complete("train.steps=10")


def test_damage_is_reported_and_the_one_before_is_used(straight: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["checkpoint.interval=5"])
    life = run.start()
    life.when(lambda: (run.checkpoints / "step_00000015").exists())
    life.kill()
    newest = complete_folders(run.checkpoints)[0]
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])  # a byte is missing at the end
    text = run.complete()
    assert f"damaged checkpoint: {shard} has" in text
    assert f"kept as {newest.name}.damaged" in text
    check_equal(run, straight)
    for folder in complete_folders(run.checkpoints):
        (folder / ".metadata").unlink()
    life = run.start()
    assert life.wait() == 2
    assert life.text.splitlines()[-1].startswith("run.resume=auto: no checkpoint in")


def test_going_back_and_beginning_from_another_run(straight: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    first = straight.checkpoints / "step_00000010"
    text = run.complete(f"run.resume={first}")  # its metrics file begins at step 11
    assert f"resumed from {first} at step 10" in text
    assert [json.dumps(row) for row in run.rows()] == [
        json.dumps(row) for row in straight.rows()[10:]
    ]
    text = run.complete(f"run.resume={first}", "train.steps=21")  # as a requeued job would
    assert "step_00000020 at step 20" in text
    own = run.checkpoints / "step_00000020"
    text = run.complete(f"run.resume={own}", "train.steps=22")
    assert "a later checkpoint is kept as step_00000021.superseded" in text
    assert [row["step"] for row in run.rows()] == list(range(11, 23))


def test_metrics_that_are_gone_are_missed(straight: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["train.steps=2", "checkpoint.interval=1"])
    run.complete()
    (run.folder / "metrics.jsonl").write_text("")
    life = run.start("train.steps=3")
    assert life.wait() == 2
    assert "metrics.jsonl has 0 bytes" in life.text and "Traceback" not in life.text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    life = Run(tmp_path / "unused", ["run.dir=/proc/no/such/place"]).start()
    assert life.wait() == 2
    assert "run.dir=/proc/no/such/place: cannot be written to" in life.text
    assert "Traceback" not in life.text


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_start_leaves_the_first_alone(tmp_path: Path, ranks: int) -> None:
    """One line, from whichever launcher, while the first saves at every step."""
    run = Run(tmp_path / "run", ["checkpoint.interval=1", "checkpoint.keep_last=2"])
    first = run.start()
    first.when(lambda: run.steps() >= 1)
    second = run.start(ranks=ranks)
    assert second.wait() == 2
    (line,) = second.text.splitlines()
    assert line.startswith(f"run.dir={run.folder}: is being written by ")
    assert f"pid {first.processes[0].pid}" in line
    assert first.processes[0].is_alive(), "the first was over before the second was told"
    assert first.wait() == 0, first.text
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    assert not (run.folder / "writer.lock").exists()


def test_what_is_in_the_way_is_found_before_the_first_step(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.checkpoints.symlink_to(tmp_path / "nothing")
    life = run.start()
    assert life.wait() == 2
    (line,) = life.text.splitlines()
    assert line.startswith(f"run.dir={run.folder}: {run.checkpoints} is not a folder")
    assert [path.name for path in run.folder.iterdir()] == ["checkpoints"], "something was written"
