"""A run goes on where the optimizer is Transformer Engine's FusedAdam instead of torch's AdamW."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core.optimizer as optimizers
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from megatron_ttt.config.schema import Config
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import checkpoint
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.optimizer_state import adam_steps
from tests.distributed.test_checkpoint import progress_at, saver
from tests.distributed.training_runs import (
    RunReport,
    global_batch,
    live_draw,
    redraw,
    tiny_config,
    train_one,
)
from tests.pool import RankPool

DTYPES = dict.fromkeys(("exp_avg", "exp_avg_sq", "master_param"), torch.float32)


class FusedAdam(torch.optim.Optimizer):
    """What FusedAdam keeps and how it saves it: steps counted per group, moments alone as state."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(parameter))
        (first, second), gradient = group["betas"], parameter.grad
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = state["exp_avg"] / (1 - first ** group["step"])
        square = state["exp_avg_sq"] / (1 - second ** group["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))

    def state_dict(self) -> dict[str, Any]:
        described = super().state_dict()
        for state in described["state"].values():
            for name, value in state.items():
                assert value.dtype is DTYPES[name]  # a KeyError for anything else, as there
        return described


@contextmanager
def engine_optimizer() -> Iterator[None]:
    """Megatron-core as it is where Transformer Engine is installed, as far as optimizers go."""
    with (
        mock.patch.object(optimizers, "Adam", FusedAdam),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        mock.patch.object(optimizers, "USING_PYTORCH_OPTIMIZER", False),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
        mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ):
        yield


def interrupted(rank: int, ranks: int, config: Config, root: Path) -> tuple[RunReport, RunReport]:
    """Three steps in one go, saved after two; the third again, from the checkpoint."""
    straight, resumed = RunReport(), RunReport()
    with megatron_on_cpu(), engine_optimizer(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        for step in range(3):
            batch = global_batch(config, step, packed=True)
            train_one(trainer, batch, straight, keep_gradients=False)
            if step == 1:
                saver(root, trainer).save(progress_at(2))
        trainer = build_trainer(config, here)
        found = checkpoint.newest(root, here, lambda _: None)
        assert found is not None
        checkpoint.load(found, trainer.state, ranks=here, seed=config.train.seed)
        batch = global_batch(config, 2, packed=True)
        train_one(trainer, batch, resumed, keep_gradients=False)
        assert adam_steps(trainer.optimizer) == {3.0}
    return straight, resumed


def test_a_run_with_the_engines_optimizer_goes_on(pool: RankPool, tmp_path: Path) -> None:
    for straight, resumed in pool.run(interrupted, tiny_config(), tmp_path, ranks=2, timeout=150):
        assert straight.losses[0] > straight.losses[2], "not training"
        assert resumed.losses == straight.losses[2:]
        assert resumed.ratios == straight.ratios[2:], "another update"
