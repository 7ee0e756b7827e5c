"""What a run reports of its steps, and a step whose gradient is not finite."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.data.batches import DataStreams
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import loop
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import Trainer, build_trainer
from megatron_ttt.training.metrics import Row
from megatron_ttt.training.resilience import StopRequest
from megatron_ttt.training.resume import BEGINNING
from tests.distributed.training_runs import (
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    tiny_config,
)
from tests.pool import RankPool

STEPS, BAD_STEP = 6, 4


class Rows:
    """A reporter that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        self.rows.append(row)


class NoSaver:
    """Saves nothing."""

    def poll(self) -> None:
        pass

    def save(self, *args: Any) -> None:
        raise AssertionError("a run that failed saves nothing")


def streams(trainer: Trainer) -> DataStreams:
    config, nothing = trainer.config, None
    rows = (
        batch
        for step in range(STEPS)
        for batch in micro_batches_of(
            global_batch(config, step, packed=False), config, trainer.ranks
        )
    )
    return DataStreams(rows, nothing, nothing, 0, 0)  # type: ignore[arg-type]


def run_into_a_nan(rank: int, ranks: int, interval: int) -> tuple[str, list[Row], bool]:
    """One element of the last rank's gradient becomes NaN: (error, rows, weights untouched)."""
    config = tiny_config()
    config = replace(
        config,
        train=replace(config.train, steps=STEPS),
        validation=replace(config.validation, interval=None),
        checkpoint=replace(config.checkpoint, interval=None),
        logging=replace(config.logging, interval=interval, sample_ids=False),
    )
    reporter: Any = Rows()
    saver: Any = NoSaver()
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        whole_step, taken = trainer.optimizer.step, 0
        before: list[Tensor] = []

        def step() -> Any:
            nonlocal taken
            taken += 1
            if taken == BAD_STEP:
                before.extend(weight.detach().clone() for weight in trainer.stage.parameters())
                if rank == ranks - 1:
                    trainer.model.buffers[0].grad_data.fill_(torch.nan)
            return whole_step()

        trainer.optimizer.step = step
        try:
            loop.train(
                trainer,
                streams(trainer),
                BEGINNING,
                reporter,
                saver,
                StopRequest(),
                ours=lambda: True,
            )
        except FloatingPointError as error:
            after = list(trainer.stage.parameters())
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            return str(error), reporter.rows, same
    return "", reporter.rows, False


@pytest.mark.parametrize("interval", [1, 100])
def test_a_gradient_that_is_not_finite_changes_no_weight(pool: RankPool, interval: int) -> None:
    """Every rank ends with the same line, and the steps before it are reported."""
    for error, rows, untouched in pool.run(run_into_a_nan, interval, ranks=2):
        assert error.startswith(f"step {BAD_STEP}: gradient norm nan; lower optimizer.lr")
        assert untouched
        assert [row["step"] for row in rows] == list(range(1, BAD_STEP))


def test_rows_do_not_depend_on_the_interval(pool: RankPool) -> None:
    """All figures but times and memory; those of fast weights where a step is reported."""
    _, often, _ = pool.run(run_into_a_nan, 1, ranks=2)[0]
    _, rarely, _ = pool.run(run_into_a_nan, 100, ranks=2)[0]
    for one, other in zip(often, rarely, strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "consumed_tokens"):
            assert one[key] == other[key]
        assert any(key.startswith("ttt/update_ratio") for key in one)
    assert [any(key.startswith("ttt/") for key in row) for row in rarely] == [True, False, False]
