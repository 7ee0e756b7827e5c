"""Training does not depend on ``GPTModel``: two other models give its losses and checkpoints.

What docs/decisions/hybrid-model.md tells was tried with these.
"""

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ttt.config.schema import Config
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import checkpoint
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from tests.distributed.test_checkpoint import progress_at, saver
from tests.distributed.test_layout_parity import EMBEDDINGS, FULL, SELECTIVE
from tests.distributed.training_runs import (
    RunReport,
    global_batch,
    live_draw,
    redraw,
    tiny_config,
    train_one,
    whole_gradients,
)
from tests.pool import RankPool

PATTERNS = {1: "E**E", 2: "E*|*E"}  # by pipeline stages; layers 0 and 3 are fast


def train_and_go_on(
    rank: int, ranks: int, config: Config, root: Path, kinds: tuple[str, str]
) -> RunReport:
    """A step with the first kind of model and a save; then a step with the second, from there."""
    report = RunReport()
    for step, kind in enumerate(kinds):
        with megatron_on_cpu(), ExitStack() as stack:
            here = stack.enter_context(model_parallel(config))
            stand_in(kind, config.parallel.pp, stack)
            trainer = build_trainer(config, here)
            if step == 0:
                redraw(trainer, live_draw)
            else:
                found = checkpoint.newest(root, here, lambda _: None)
                assert found is not None
                checkpoint.load(found, trainer.state, ranks=here, seed=config.train.seed)
            batch = global_batch(config, step, packed=True)
            train_one(trainer, batch, report, keep_gradients=True)
            if step == 0:
                saver(root, trainer).save(progress_at(1))
    return report


def stand_in(kind: str, stages: int, stack: ExitStack) -> None:
    """Build another model than ``GPTModel`` while ``stack`` is open."""
    from tests.distributed import other_models

    if kind == "gpt":
        return
    model: Any = other_models.OwnModel
    if kind == "hybrid":
        model = other_models.hybrid_model(PATTERNS[stages])
        stack.enter_context(mock.patch(*other_models.FINAL_NORM))
    stack.enter_context(mock.patch("megatron_ttt.model.build.InPlaceTTTModel", model))


def kinds() -> list[str]:
    """What this megatron-core has."""
    hybrid = importlib.util.find_spec("megatron.core.models.hybrid") is not None
    return ["own", "hybrid"] if hybrid else ["own"]


CASES = [
    {"tp": 2, **EMBEDDINGS, **FULL},
    {"pp": 2, **SELECTIVE},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_another_model_trains_the_same_and_reads_its_checkpoints(
    pool: RankPool, tmp_path: Path, changes: dict[str, Any]
) -> None:
    def run(*pair: str) -> list[RunReport]:
        arguments = (train_and_go_on, tiny_config(**changes), tmp_path / "-".join(pair), pair)
        return pool.run(*arguments, ranks=2, timeout=150)

    expected = run("gpt", "gpt")
    for kind in kinds():
        for reports in (run(kind, "gpt"), run("gpt", kind)):
            assert reports[0].losses == expected[0].losses
            assert reports[0].grad_norms == expected[0].grad_norms
            gradients = whole_gradients(reports)
            for name, gradient in whole_gradients(expected).items():
                assert torch.equal(gradients[name], gradient), f"{kind}: {name}"
