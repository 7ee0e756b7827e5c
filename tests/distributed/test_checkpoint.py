"""Saving and loading on real ranks: every layout goes on where another stopped."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.checkpoints import run_files as files
from megatron_ttt.checkpoints.manifest import read_manifest
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import Config, OptimizerForm, Trainable
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import checkpoint
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, Retention, SaveFailed, SaveMode
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.loop import Trainer, build_trainer
from megatron_ttt.training.optimizer_state import adam_steps, prime_adam
from tests.distributed.training_runs import (
    RunReport,
    global_batch,
    live_draw,
    redraw,
    tiny_config,
    train_one,
)
from tests.pool import RankPool

HALF, WHOLE = 10, 20
LIVE = {"eta": 0.002}  # update ratios of 0.08 to 0.5 over the whole run
LOSS_BOUND, NORM_BOUND = 2e-5, 5e-4


@dataclass
class Leg:
    """Part of a run: its losses and norms, AdamW's steps afterwards, random numbers drawn then."""

    losses: list[float]
    grad_norms: list[float]
    ratios: list[float]
    adam_steps: set[float]
    draws: list[float]


def saver(root: Path, trainer: Trainer) -> CheckpointSaver:
    return CheckpointSaver(
        root,
        trainer.state,
        ranks=trainer.ranks,
        mode=SaveMode.SYNCHRONOUS,
        facts={},
        retention=Retention(),
        report=lambda _: None,
    )


def progress_at(step: int) -> Progress:
    return Progress(step, 8 * step, 8 * 128 * step, 0)


FULL, BY_BUCKET = OptimizerForm.fully_reshardable, OptimizerForm.dp_reshardable


def run_leg(
    rank: int, ranks: int, config: Config, root: Path, first: int, form: OptimizerForm = FULL
) -> Leg:
    """Train steps ``first`` to ``WHOLE``, from the checkpoint unless at 0; save after ``HALF``."""
    report = RunReport()
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        if first == 0:
            redraw(trainer, live_draw)
            torch.manual_seed(1000 + rank)
        else:
            found = checkpoint.newest(root, here, lambda _: None)
            assert found is not None and found.progress == progress_at(first)
            checkpoint.load(found, trainer.state, ranks=here, seed=config.train.seed)
        for step in range(first, WHOLE):
            batch = global_batch(config, step, packed=True)
            train_one(trainer, batch, report, keep_gradients=False)
            if step + 1 == HALF:
                saver(root, trainer).save(progress_at(HALF), form)
        ratios = [ratio for step in report.ratios for ratio in step.values()]
        draws = torch.rand(2).tolist()
        steps = adam_steps(trainer.optimizer)
        return Leg(report.losses, report.grad_norms, ratios, steps, draws)


def untrained(config: Config, here: Ranks) -> Trainer:
    """A model before its first step, with an optimizer state to save."""
    trainer = build_trainer(config, here)
    prime_adam(trainer.optimizer)
    return trainer


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


RATE = {"target_lr_factor": 4.0}  # the optimizer has groups of parameters
FROZEN = {"trainable": Trainable.target_generator}
LAYOUTS: list[tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = [
    ((2, {"tp": 2}), (2, {"pp": 2})),
    ((2, {"pp": 2, "tied": False}), (2, {"tp": 2, "tied": False})),
    ((1, {}), (2, {})),  # dp 1 to dp 2
    ((2, {}), (1, {})),
    ((2, {"distributed_optimizer": False}), (2, {"distributed_optimizer": False})),
    ((1, {}), (2, {"cp": 2})),
    ((2, {"cp": 2}), (4, {"tp": 2, "pp": 2})),
    ((4, {"tp": 2, "cp": 2}), (2, {})),
    # A tied embedding is a bucket of its own with several stages; its padding lies between others.
    ((4, {"pp": 2}), (2, {"tp": 2})),
    ((2, {"bucket_size": 4000, "overlap_grad_reduce": True}), (1, {})),
    ((2, {"tp": 2, **FROZEN}), (2, {"cp": 2, **FROZEN})),
    ((2, {"tp": 2, **RATE}), (2, {"cp": 2, **RATE})),
    ((4, {"tp": 2, "pp": 2, **RATE}), (2, {**RATE})),
]


@pytest.mark.parametrize(("before", "after"), LAYOUTS, ids=str)
def test_a_run_goes_on_at_another_layout(
    pool: RankPool,
    tmp_path: Path,
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
) -> None:
    first, second = (tiny_config(**LIVE, **changes) for _, changes in (before, after))
    whole = pool.run(run_leg, first, tmp_path, 0, ranks=before[0], timeout=150)[0]
    assert min(whole.ratios) > 0.02 and max(whole.ratios) < 0.6, "fast weights not alive"
    for leg in pool.run(run_leg, second, tmp_path, HALF, ranks=after[0], timeout=150):
        assert relative(leg.losses, whole.losses[HALF:]) < LOSS_BOUND
        assert relative(leg.grad_norms, whole.grad_norms[HALF:]) < NORM_BOUND
        assert leg.adam_steps == {float(WHOLE)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, {}), (1, {})),
        ((2, {"tp": 2}), (4, {"tp": 2, "cp": 2})),
        ((4, {"pp": 2}), (2, {"pp": 2})),
    ],
    ids=str,
)
def test_state_by_bucket_goes_on_with_other_numbers_of_data_ranks(
    pool: RankPool,
    tmp_path: Path,
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
) -> None:
    first, second = (tiny_config(**LIVE, **changes) for _, changes in (before, after))
    whole = pool.run(run_leg, first, tmp_path, 0, BY_BUCKET, ranks=before[0], timeout=150)[0]
    facts = read_manifest(tmp_path / f"step_{HALF:08d}").facts
    # With two stages the last bucket's padding lies where Megatron cannot save it by bucket.
    possible = FULL if before[1].get("pp") == 2 else BY_BUCKET
    assert facts["optimizer"]["form"] == possible.value
    for leg in pool.run(run_leg, second, tmp_path, HALF, ranks=after[0], timeout=150):
        assert relative(leg.losses, whole.losses[HALF:]) < LOSS_BOUND
        assert relative(leg.grad_norms, whole.grad_norms[HALF:]) < NORM_BOUND
        assert leg.adam_steps == {float(WHOLE)}


def refusals(rank: int, ranks: int, saved: Config, others: list[Config], root: Path) -> list[str]:
    """What loading a checkpoint of ``saved`` says at each of the other layouts."""
    with megatron_on_cpu(), model_parallel(saved) as here:
        saver(root, untrained(saved, here)).save(progress_at(1), BY_BUCKET)
    said = []
    for config in others:
        with megatron_on_cpu(), model_parallel(config) as here:
            trainer = build_trainer(config, here)
            found = checkpoint.newest(root, here, lambda _: None)
            assert found is not None
            with pytest.raises(checkpoint.UnfitCheckpoint) as refused:
                checkpoint.load(found, trainer.state, ranks=here, seed=config.train.seed)
            said.append(str(refused.value))
    return said


def test_state_by_bucket_is_refused_in_one_line_where_it_does_not_load(
    pool: RankPool, tmp_path: Path
) -> None:
    others = [tiny_config(pp=2), tiny_config(), tiny_config(tp=2, bucket_size=4000)]
    others[2].parallel.overlap_grad_reduce = True
    for lines in pool.run(refusals, tiny_config(tp=2), others, tmp_path, ranks=2, timeout=150):
        assert not any("\n" in line for line in lines)
        assert "with tp=2 pp=1, and loads with these alone: now tp=1 pp=2; " in lines[0]
        assert "now tp=1 pp=1; " in lines[1]
        assert "gradient buckets (parallel.bucket_size, overlap_grad_reduce) are others" in lines[2]


@pytest.mark.parametrize("form", list(OptimizerForm), ids=lambda form: form.value)
def test_the_same_layout_goes_on_bit_by_bit(
    pool: RankPool, tmp_path: Path, form: OptimizerForm
) -> None:
    config = tiny_config(**LIVE, tp=2)
    whole = pool.run(run_leg, config, tmp_path, 0, form, ranks=2, timeout=150)
    for leg, straight in zip(
        pool.run(run_leg, config, tmp_path, HALF, ranks=2, timeout=150), whole, strict=True
    ):
        assert leg.losses == straight.losses[HALF:]
        assert leg.grad_norms == straight.grad_norms[HALF:]
        assert leg.draws == straight.draws  # random states too, of each rank its own
    assert whole[0].draws != whole[1].draws


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond ``limit`` bytes: how a full disk fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail_on_last_rank(rank: int, ranks: int, config: Config, root: Path) -> tuple[str, str, int]:
    """A good save, one that fails on the last rank alone, and one more."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = untrained(config, here)
        saving = saver(root, trainer)
        saving.save(progress_at(1))
        message = ""
        with small_files(100_000 if rank == ranks - 1 else 1 << 40):
            try:
                saving.save(progress_at(2))
            except SaveFailed as error:
                message = str(error)
        survivor = checkpoint.newest(root, here, lambda _: None)
        assert survivor is not None
        saving.save(progress_at(3))
        return message, survivor.folder.name, len(list(root.glob("*.partial*")))


def test_a_failure_on_one_rank_fails_the_save_on_all(pool: RankPool, tmp_path: Path) -> None:
    for report in pool.run(fail_on_last_rank, tiny_config(tp=2), tmp_path, ranks=2):
        message, survivor, leftovers = report
        assert "checkpoint of step 2 not saved" in message
        assert "File too large" in message
        assert survivor == "step_00000001"
        assert leftovers == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_00000001", "step_00000003", "latest"}


def refuse_folder(rank: int, ranks: int, config: Config, root: Path) -> str:
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = untrained(config, here)
        with pytest.raises(SaveFailed) as caught:
            saver(root, trainer).save(progress_at(1))
        return str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_line(pool: RankPool, tmp_path: Path) -> None:
    occupied = tmp_path / "checkpoints"
    occupied.write_text("a file where the folder should be")
    for message in pool.run(refuse_folder, tiny_config(), occupied, ranks=2):
        assert "checkpoints: File exists" in message and "\n" not in message


def damage_and_look(
    rank: int, ranks: int, config: Config, root: Path, damaged: list[int]
) -> tuple[str, list[str]]:
    """Which checkpoint is found after some are damaged, and what was said."""
    with megatron_on_cpu(), model_parallel(config) as here:
        said: list[str] = []
        if not root.exists():
            trainer = untrained(config, here)
            for step in (1, 2, 3):
                saver(root, trainer).save(progress_at(step))
        checkpoint.on_first_rank(here, lambda: [damage(root, step) for step in damaged])
        try:
            found = checkpoint.newest(root, here, said.append)
        except ConfigError as error:
            return str(error), said
        return "" if found is None else found.folder.name, said


def damage(root: Path, step: int) -> None:
    """Flip one bit in the middle of the largest file."""
    folder = files.step_folder(root, step)
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_damage_is_reported_set_aside_and_never_ignored(pool: RankPool, tmp_path: Path) -> None:
    root, config = tmp_path / "checkpoints", tiny_config()
    for found, said in pool.run(damage_and_look, config, root, [3], ranks=2):
        assert found == "step_00000002"
        assert len(said) == 1 and "does not match its checksum" in said[0]
        assert "kept as step_00000003.damaged" in said[0]
    assert (root / "step_00000003.damaged").is_dir()
    for found, said in pool.run(damage_and_look, config, root, [1, 2], ranks=2):
        assert found.startswith("run.resume=auto: no checkpoint in") and len(said) == 2
    for found, _ in pool.run(damage_and_look, config, root, [], ranks=2):
        assert "undamaged" in found  # also at the next start: never silently from step 0


def load_other(rank: int, ranks: int, config: Config, root: Path) -> str:
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = untrained(config, here)
        folder = files.step_folder(root, 1)
        with pytest.raises(checkpoint.UnfitCheckpoint) as caught:
            checkpoint.load_weights(folder, trainer.state, ranks=here)
        return str(caught.value)


def save_one(rank: int, ranks: int, config: Config, root: Path) -> None:
    with megatron_on_cpu(), model_parallel(config) as here:
        saver(root, untrained(config, here)).save(progress_at(1))


def test_another_model_is_refused_in_words(pool: RankPool, tmp_path: Path) -> None:
    config = tiny_config()
    pool.run(save_one, config, tmp_path, ranks=1)
    config.model.hidden_size = 48
    for message in pool.run(load_other, config, tmp_path, ranks=2):
        assert "mismatch" in message and "\n" not in message and len(message) < 500


def test_a_newer_format_is_refused_in_words(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_one, tiny_config(), tmp_path, ranks=1)
    common = files.step_folder(tmp_path, 1) / "common.pt"
    if not common.exists():
        pytest.skip("this megatron-core reads both formats")
    common.unlink()  # as newer ones leave it out
    for message in pool.run(load_other, tiny_config(), tmp_path, ranks=1):
        assert "saved by a newer megatron-core" in message
