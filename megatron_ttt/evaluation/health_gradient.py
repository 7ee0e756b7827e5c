"""Where the gradient of one pass over the rows lies: conv, projection and W0 of each fast layer.

The pass is a training step's without an optimizer: Megatron's schedule, gradient buffers and their
reduction; the loss per counted token, over all rows and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_ttt.config.schema import TTTMode
from megatron_ttt.config.to_megatron import ddp_config
from megatron_ttt.data.rows import Batch
from megatron_ttt.evaluation.health_advice import PARTS
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.initialize import global_parameters, sharded_dim
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.training.step import ForwardStep, LossSum, run_micro_batches


@dataclass(frozen=True)
class GradientSquares:
    """Squared norms of the gradient of the loss per token, over all tensor ranks.

    Attributes:
        layers: by fast layer (from 0), of each of :data:`PARTS` that it has.
        total: of all parameters of the model.
    """

    layers: dict[int, dict[str, float]]
    total: float


def loss_without_fast_weights(subject: Subject, rows: Sequence[Batch]) -> LossSum:
    """Loss over the rows of all ranks, from the same weights, nothing written."""
    model = subject.model
    step = _step(subject, TTTMode.off)
    with torch.no_grad():
        sums = run_micro_batches(
            step, model, iter(rows), micro_batches=len(rows), forward_only=True
        )
    return LossSum.over(subject.ranks, sums)


def loss_and_gradient(subject: Subject, rows: Sequence[Batch]) -> tuple[LossSum, GradientSquares]:
    """Loss over the rows of all ranks with fast weights, and its gradient's parts.

    Every rank calls this with at least one micro-batch; ranks may have different numbers of them.
    The model keeps its gradient buffers afterwards.
    """
    model, config, groups = subject.model, subject.config, subject.ranks.groups
    # Whole gradients on every rank, not a shard for an optimizer.
    parallel = replace(config.parallel, distributed_optimizer=False)
    settings = ddp_config(replace(config, parallel=parallel))
    wrapped = DistributedDataParallel(model.config, settings, model, pg_collection=groups)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped.zero_grad_buffer()
    step = _step(subject, TTTMode.in_place)
    sums = run_micro_batches(step, wrapped, iter(rows), micro_batches=len(rows), forward_only=False)
    return LossSum.over(subject.ranks, sums), _squares(subject)


def _step(subject: Subject, mode: TTTMode) -> ForwardStep:
    config, ranks = subject.config, subject.ranks
    return ForwardStep(
        config, ranks, scan=scan_settings(config.parallel, ranks.scan_group), mode=mode
    )


def _squares(subject: Subject) -> GradientSquares:
    """Split parameters are summed over tensor ranks; the others are equal there, counted once."""
    names, whole, split = [], [], []
    for name, parameter in global_parameters(subject.model):
        square = _main_gradient(parameter).double().square().sum()
        nothing = torch.zeros_like(square)
        names.append(name)
        is_split = sharded_dim(parameter) is not None
        split.append(square if is_split else nothing)
        whole.append(nothing if is_split else square)
    summed = torch.stack(split)
    dist.all_reduce(summed, group=subject.ranks.groups.tp)
    squares = dict(zip(names, (summed + torch.stack(whole)).tolist(), strict=True))
    layers: dict[int, dict[str, float]] = {}
    for layer in subject.model.decoder.layers:
        prefix, number = f"decoder.layers.{layer.layer_number - 1}.", layer.layer_number - 1
        if isinstance(layer.mlp, FastWeightMLP):
            layers[number] = {
                part: squares[prefix + name]
                for part, name in PARTS.items()
                if prefix + name in squares
            }
    return GradientSquares(layers, sum(squares.values()))


def _main_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Where Megatron's buffers gather a parameter's gradient."""
    gradient = getattr(parameter, "main_grad")  # noqa: B009
    assert isinstance(gradient, Tensor)
    return gradient
