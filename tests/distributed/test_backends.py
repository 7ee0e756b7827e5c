"""Checkpoints do not depend on the attention backend: each reads what the other wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.config.schema import AttentionBackend, Config, OptimizerForm
from megatron_ttt.conversion.mapping import build_mapping
from megatron_ttt.conversion.ttt_config import target_generator
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import checkpoint
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, Retention, SaveMode
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.loop import Trainer, build_trainer
from tests.distributed.te_stand_in import transformer_engine_stand_in
from tests.distributed.training_runs import (
    RunReport,
    global_batch,
    live_draw,
    redraw,
    tiny_config,
    train_one,
)
from tests.pool import RankPool


def with_backend(backend: AttentionBackend) -> Config:
    config = tiny_config()
    return replace(config, model=replace(config.model, attention=backend))


def step_and_save(trainer: Trainer, root: Path, step: int) -> float:
    """Loss of step ``step`` and the state after it, saved."""
    report = RunReport()
    batch = global_batch(trainer.config, step, packed=True)
    train_one(trainer, batch, report, keep_gradients=False)
    saver = CheckpointSaver(
        root,
        trainer.state,
        ranks=trainer.ranks,
        mode=SaveMode.SYNCHRONOUS,
        facts={},
        retention=Retention(),
        report=lambda _: None,
    )
    saver.save(Progress(step + 1, 0, 0, 0))
    return report.losses[0]


def resume(trainer: Trainer, root: Path, ranks: Ranks) -> None:
    found = checkpoint.newest(root, ranks, lambda _: None)
    assert found is not None
    checkpoint.load(found, trainer.state, ranks=ranks, seed=5)


def stored_names(trainer: Trainer, ranks: Ranks) -> set[str]:
    state = trainer.stage.sharded_state_dict(
        metadata=checkpoint.content(OptimizerForm.fully_reshardable)
    )
    return {part.key for part in state.values()}


def take_turns(rank: int, ranks: int, root: Path) -> dict[str, Any]:
    """Step 0 with torch, 1 with the stand-in, 2 with torch, each from the other's checkpoint."""
    plain, fused = (
        with_backend(backend)
        for backend in (AttentionBackend.torch, AttentionBackend.transformer_engine)
    )
    with megatron_on_cpu(), model_parallel(plain) as here:
        straight = build_trainer(plain, here)
        redraw(straight, live_draw)
        expected = [step_and_save(straight, root / "straight", step) for step in range(3)]
        first = build_trainer(plain, here)
        redraw(first, live_draw)
        losses = [step_and_save(first, root / "turns", 0)]
        with transformer_engine_stand_in():
            second = build_trainer(fused, here)
        resume(second, root / "turns", here)
        losses.append(step_and_save(second, root / "turns", 1))
        third = build_trainer(plain, here)
        resume(third, root / "turns", here)
        losses.append(step_and_save(third, root / "turns", 2))
        return {
            "expected": expected,
            "losses": losses,
            "extra": sum(name.endswith("_extra_state") for name in second.stage.state_dict()),
            "names": [stored_names(trainer, here) for trainer in (first, second)],
        }


def test_backends_go_on_from_each_others_checkpoints(pool: RankPool, tmp_path: Path) -> None:
    (told,) = pool.run(take_turns, tmp_path, ranks=1)
    assert told["losses"] == pytest.approx(told["expected"], rel=1e-6)
    assert told["extra"] > 10  # the stand-in's modules have an extra state, and none is stored
    plain, fused = told["names"]
    assert plain == fused
    config = with_backend(AttentionBackend.torch)
    mapping = build_mapping(config.model, target_generator(config.ttt, layers=config.model.layers))
    assert plain == {tensor.megatron for tensor in mapping.tensors}  # what an import writes
