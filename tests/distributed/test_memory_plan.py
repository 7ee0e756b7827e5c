"""The memory plan against real ranks, by part: nothing of it is a guess that no machine checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_ttt.benchmarks.memory_plan import counted_layers
from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.memory import stage_parameters, static_memory
from megatron_ttt.config.schema import Config, Precision, Recompute, Trainable
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.fast_weights import update
from megatron_ttt.fast_weights.inside import InsideScores
from megatron_ttt.model import attention
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import WriteKind, WriteSettings
from megatron_ttt.training import loop
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.step import ForwardStep
from tests.distributed.training_runs import (
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    tiny_config,
)
from tests.pool import RankPool

GATED = WriteSettings(WriteKind.gated)
CASES = [
    (1, {}),
    (1, {"write": GATED, "tied": False, "distributed_optimizer": False}),
    (2, {"distributed_optimizer": False}),  # dp = 2
    (2, {}),
    (2, {"tp": 2}),
    (2, {"cp": 2}),
    (1, {"trainable": Trainable.fast_layers, "distributed_optimizer": False}),
    (2, {"tp": 2, "trainable": Trainable.target_generator, "distributed_optimizer": False}),
    (2, {"pp": 2}),  # tied: both stages hold the embedding
    (4, {"tp": 2, "pp": 2, "tied": False, "write": GATED}),
]


@dataclass
class Held:
    """Bytes that one rank holds."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    saved: int
    loss: float


def held(rank: int, ranks: int, config: Config) -> Held:
    """Build, train one step, and keep the graph of one micro-batch; called through the pool."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        batch = global_batch(config, 0, packed=config.data.reset_fast_weights)
        trainer.train_step(micro_batches_of(batch, config, here))
        parameters = list(trainer.stage.parameters())
        saved, loss = 0, 0.0
        if config.parallel.pp == 1:
            step = ForwardStep(config, here, scan=trainer.scan, mode=config.ttt.mode)
            with saving([*parameters, *_buffers(trainer)]) as storages:
                output, loss_of = step(micro_batches_of(batch, config, here), trainer.stage)
                total = loss_of(output)[0]
            total.backward()
            loss = float(total.detach())
            saved = sum(storages.values())
        return Held(
            sum(parameter.numel() for parameter in parameters),
            sum(_bytes(parameter) for parameter in parameters),
            sum(_bytes(buffer.grad_data) for buffer in trainer.model.buffers),
            sum(_bytes(tensor) for tensor in _states(trainer.optimizer)),
            saved,
            loss,
        )


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what a GPU's kernel keeps: input, weight, one number a row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (inputs.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(inputs, weight, scale)
        return inputs * scale * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, weight, scale = ctx.saved_tensors
        above = grad * weight
        inner = (above * inputs).mean(-1, keepdim=True) * scale.square()
        d_weight = (grad * inputs * scale).flatten(0, -2).sum(0)
        return scale * (above - inputs * inner), d_weight, None


@contextmanager
def fused_as_on_a_gpu() -> Iterator[None]:
    """Megatron's fused functions, run eagerly, fused norms, no kept scores: unlike a CPU's run."""

    def fused(*arguments: Any, **options: Any) -> Any:
        made = transformer_config(*arguments, **options)
        return replace(made, bias_activation_fusion=True, bias_dropout_fusion=True)

    def norm(inputs: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = _FusedNorm.apply(inputs, weight, eps)
        return normed

    with (
        mock.patch.object(loop, "transformer_config", fused),
        mock.patch.object(torch.nn.functional, "rms_norm", norm),
        mock.patch.object(update, "_scores", lambda keys: InsideScores.REMADE),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def held_as_on_a_gpu(rank: int, ranks: int, config: Config) -> Held:
    """:func:`held`, with the fused functions that a GPU gets."""
    with fused_as_on_a_gpu():
        return held(rank, ranks, config)


def _buffers(trainer: Any) -> Iterator[Tensor]:
    """What weights are views of."""
    return (b.param_data for b in trainer.model.buffers if b.param_data is not None)


def _states(optimizer: Any) -> Iterator[Tensor]:
    for chained in optimizer.chained_optimizers:
        for state in chained.optimizer.state.values():
            yield from (state[name] for name in ("exp_avg", "exp_avg_sq"))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def saving(excluded: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every storage that the graph built inside keeps, by its address."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


@pytest.mark.parametrize(("ranks", "changes"), CASES)
def test_every_part_is_what_ranks_hold(pool: RankPool, ranks: int, changes: dict[str, Any]) -> None:
    config = tiny_config(packed=False, window=None, **changes)
    parallel = config.parallel
    reports = pool.run(held, config, ranks=ranks, timeout=120)
    stages = [ranks * stage // parallel.pp for stage in range(parallel.pp)]  # a rank of each
    shards = ranks // (parallel.tp * parallel.pp)
    for stage, rank in enumerate(stages):
        found: Held = reports[rank]
        plan = static_memory(config, stage=stage, shards=shards, compute_bytes=4)
        assert found.parameters == plan.parameters == stage_parameters(config, stage)
        assert found.weights == plan.weights
        if not parallel.distributed_optimizer:
            assert (found.gradients, found.optimizer) == (plan.gradients, plan.optimizer)
            continue
        # buffers: parameters begin at multiples of 64, buckets end at multiples of 128 and of ranks
        tensors = 64 * config.model.layers + 8
        assert 0 <= found.gradients - plan.gradients <= 4 * (64 * tensors + 128 * shards)
        padding = 2 * 4 * (64 * tensors + 128 * shards)
        assert abs(sum(r.optimizer for r in reports) / ranks - plan.optimizer) <= padding


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (1, {"recompute": Recompute.full}),
        (1, {"loss_tokens": 40}),
        (2, {"tp": 2}),
        (2, {"cp": 2}),
    ],
)
def test_layers_keep_what_was_counted(pool: RankPool, ranks: int, changes: dict[str, Any]) -> None:
    """Counted on meta tensors, kept on a CPU that computes by the functions of a GPU."""
    config = tiny_config(packed=False, window=None, **changes)
    if config.parallel.cp > 1:  # several rows' spans are packed by copies, which a CPU has not
        config = replace(config, train=replace(config.train, micro_batch_size=1))
    found: Held = pool.run(held_as_on_a_gpu, config, ranks=ranks, timeout=120)[0]
    exact = replace(config, train=replace(config.train, precision=Precision.fp32))
    with mock.patch.object(attention, "kernel_for", lambda tensor: attention.Kernel.VARLEN):
        layers = counted_layers(exact)
    fast = len(ttt_layers(config))
    plain = config.model.layers - fast
    counted = plain * layers.plain + fast * layers.fast + layers.ends
    # A GPU joins the outputs of a rank's two spans by a copy, and keeps both.
    bound = 0.07 if config.parallel.cp > 1 else 0.02
    assert counted * (1 - bound) <= found.saved <= counted * 1.02


def test_a_gpus_functions_compute_the_same(pool: RankPool) -> None:
    """SwiGLU of both kinds of layers, and norms, fused and not."""
    config = tiny_config()
    plain, fused = (
        pool.run(run, config, ranks=1, timeout=120)[0] for run in (held, held_as_on_a_gpu)
    )
    assert fused.loss == pytest.approx(plain.loss, rel=1e-6)
    assert fused.saved < 0.9 * plain.saved
