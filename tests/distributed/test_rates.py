"""The target generator's own learning rate and the warm-up of eta: that they act, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.derived import eta_factor
from megatron_ttt.config.schema import Config
from megatron_ttt.model.initialize import global_parameters
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import added_start
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.figures import StepFigures, gather_rows
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.metrics import Row
from tests.distributed.training_runs import (
    RunReport,
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    run_training,
    tiny_config,
)
from tests.pool import RankPool

FACTOR, WARMUP = 4.0, 3


def first_step(rank: int, ranks: int, config: Config) -> tuple[dict[str, Tensor], Row]:
    """By how much a step moves every parameter, and its row of the metrics."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        before = {name: p.detach().clone() for name, p in global_parameters(trainer.stage)}
        batch, lr = global_batch(config, 0, packed=True), trainer.lr
        sums, norm, observations = trainer.train_step(
            micro_batches_of(batch, config, here), eta_factor=eta_factor(config, 1)
        )
        moved = {name: p.detach() - before[name] for name, p in global_parameters(trainer.stage)}
        figures = StepFigures(1, sums, norm, lr, 1.0, 0, observations.pairs, 0)
        (row,) = gather_rows([figures], observations, trainer.model, config, here)
        return moved, row


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_target_moves_by_its_own_rate(pool: RankPool, ranks: int) -> None:
    """AdamW's step is proportional to the rate, decay included: four times, and nothing else."""
    (usual, plain), (faster, told) = (
        pool.run(first_step, tiny_config(target_lr_factor=factor), ranks=ranks, timeout=100)[0]
        for factor in (1.0, FACTOR)
    )
    target = {name for name in usual if added_start(name) is not None}
    assert len(target) == 4  # a convolution and a projection in two layers
    for name, moved in usual.items():
        assert moved.norm() > 0, name
        wanted = FACTOR * moved if name in target else moved
        assert (faster[name] - wanted).norm() < 1e-3 * wanted.norm(), name
    assert told["ttt/lr"] == FACTOR * told["lr"] and told["lr"] == plain["lr"] > 0
    assert "ttt/lr" not in plain and "ttt/eta" not in plain


def test_eta_rises_with_the_steps(pool: RankPool) -> None:
    """The first step of a warm-up is that of a run with a share of eta; later ones are others'."""
    config = tiny_config()
    rising = replace(config, train=replace(config.train, eta_warmup_steps=WARMUP))
    lower = replace(config, ttt=replace(config.ttt, eta=config.ttt.eta / WARMUP))
    (found, row), (expected, other) = (
        pool.run(first_step, one, ranks=1, timeout=100)[0] for one in (rising, lower)
    )
    for name, moved in expected.items():
        assert (found[name] - moved).norm() < 1e-4 * moved.norm(), name
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
    layers = [key for key in row if key.startswith("ttt/update_ratio")]
    assert layers and all(row[key] == pytest.approx(other[key], rel=1e-5) for key in layers)
    assert row["ttt/eta"] == pytest.approx(config.ttt.eta / WARMUP)

    steps = WARMUP + 1
    runs: list[RunReport] = [
        pool.run(run_training, one, steps, ranks=1, timeout=100)[0] for one in (rising, config)
    ]
    ratios: list[list[Any]] = [[step[0] for step in run.ratios] for run in runs]
    shares = [one / whole for one, whole in zip(*ratios, strict=True)]
    assert shares[0] == pytest.approx(1 / WARMUP, rel=1e-4)  # of equal weights
    assert shares[1] == pytest.approx(2 / WARMUP, rel=0.2) and shares[2:] == pytest.approx(
        [1.0, 1.0], rel=0.2
    )
    assert torch.isfinite(torch.tensor(runs[0].losses)).all()
