"""Training some parameters alone: the others keep their bytes and cost nothing, on every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import Config, Recompute, Trainable
from megatron_ttt.model.initialize import global_parameters
from megatron_ttt.model.trainable import is_trained
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import TargetSource
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from tests.distributed.training_runs import (
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    run_training,
    tiny_config,
    whole_gradients,
)
from tests.pool import RankPool

STEPS = 20
PARTS = [Trainable.fast_layers, Trainable.target_generator]
LAYOUTS = [
    (2, {"tp": 2}),
    (2, {"cp": 2, "recompute": Recompute.full}),
    (2, {"recompute": Recompute.selective, "recompute_modules": ("core_attn", "mlp")}),
    (4, {"tp": 2, "cp": 2, "target": TargetSource.input_embeddings, "eta": 0.002}),
]


@dataclass
class Trained:
    """What twenty steps left: names that moved, elements with gradients and optimizer state."""

    moved: set[str]
    still: set[str]
    gradient_elements: int
    state_elements: int
    asks: list[bool]  # per layer, whether its input asks for a gradient


def train(rank: int, ranks: int, config: Config) -> Trained:
    """Train and compare every byte; called through the pool."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        asks: list[bool] = []
        for layer in trainer.stage.decoder.layers:
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: asks.append(
                    (kwargs.get("hidden_states", args[0] if args else None)).requires_grad
                ),
                with_kwargs=True,
            )
        before = {name: p.detach().clone() for name, p in global_parameters(trainer.stage)}
        for step in range(STEPS):
            batch = global_batch(config, step, packed=True)
            trainer.train_step(micro_batches_of(batch, config, here))
        moved = {
            name
            for name, parameter in global_parameters(trainer.stage)
            if not _same_bytes(parameter.detach(), before[name])
        }
        states = [
            state["exp_avg"].numel()
            for chained in trainer.optimizer.chained_optimizers
            for state in chained.optimizer.state.values()
        ]
        buffers = [buffer.grad_data.numel() for buffer in trainer.model.buffers]
        still = before.keys() - moved
        return Trained(moved, set(still), sum(buffers), sum(states), asks[: config.model.layers])


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("trainable", PARTS)
def test_what_is_frozen_keeps_its_bytes(pool: RankPool, trainable: Trainable) -> None:
    config = tiny_config(trainable=trainable, distributed_optimizer=False)
    config.ttt.layers = [1, 3]
    found: Trained = pool.run(train, config, ranks=1, timeout=120)[0]
    assert found.moved == {n for n in found.moved | found.still if is_trained(n, trainable, [1, 3])}
    assert len(found.moved) == (4 if trainable is Trainable.target_generator else 2 * 10)
    whole: Trained = pool.run(
        train, tiny_config(distributed_optimizer=False), ranks=1, timeout=120
    )[0]
    assert not whole.still
    assert found.gradient_elements == found.state_elements < 0.6 * whole.gradient_elements
    # the first trained layer is 1: nothing below it has a backward
    assert found.asks == [False, False, True, True] and all(whole.asks)


@pytest.mark.parametrize("trainable", PARTS)
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_every_layout_trains_the_same(
    pool: RankPool, ranks: int, layout: dict[str, Any], trainable: Trainable
) -> None:
    variant = {key: layout[key] for key in ("target", "eta") if key in layout}
    one = pool.run(
        run_training, tiny_config(trainable=trainable, **variant), 3, ranks=1, timeout=120
    )
    many = pool.run(
        run_training, tiny_config(trainable=trainable, **layout), 3, ranks=ranks, timeout=120
    )
    expected, found = whole_gradients(one), whole_gradients(many)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-4, name
        assert gradient.norm() > 0
    assert many[0].losses == pytest.approx(one[0].losses, rel=2e-5)
