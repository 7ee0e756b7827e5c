"""All figures of a health report: of states, of the gradient, of the loss without fast weights.

One training step's forward and backward over the rows, without an optimizer, gives every figure:
Megatron's schedule, gradient buffers and their reduction, the loss per counted token over all rows
and ranks; ``health_probe.py`` looks at the states. A second forward without fast weights gives the
loss to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.config.to_megatron import ddp_config
from megatron_ttt.data.rows import Batch
from megatron_ttt.evaluation.health_advice import PARTS, Health, LayerHealth
from megatron_ttt.evaluation.health_probe import FIGURES, StateProbe, chosen_places
from megatron_ttt.evaluation.losses import forward_step
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.initialize import global_parameters
from megatron_ttt.model.shards import sharded_dim
from megatron_ttt.training.step import LossSum, run_micro_batches


def measure_health(subject: Subject, rows: list[Batch], *, positions: int) -> Health:
    """Measure all figures; called on every rank, equal on every rank.

    Args:
        subject: the model.
        rows: this data-parallel rank's micro-batches, whole rows of one length.
        positions: how many places along the row are looked at.

    Raises:
        ConfigError: no fast weights are read, the row is cut over ranks, it is one chunk, or some
            data-parallel rank has no row.
    """
    length = _checked_length(subject, rows)
    ranks, chunk_size = subject.ranks, subject.config.ttt.chunk_size
    places = chosen_places(chunks=-(-length // chunk_size), positions=positions)
    probe = StateProbe(places, device=ranks.device)
    with probe.attached(subject.model):
        loss_on, gradient = loss_and_gradient(subject, rows)
    loss_off = loss_without_fast_weights(subject, rows)
    model = subject.config.model
    layers = [
        LayerHealth(
            layer=layer,
            **dict(zip(FIGURES, means_GP.tolist(), strict=True)),
            largest_rank=min(model.hidden_size, model.ffn_hidden_size),
            gradient_shares=_shares(gradient, layer),
        )
        for layer, means_GP in probe.means(ranks.groups.dp_cp).items()
    ]
    return Health(
        length=length,
        rows=_sum_over_data(subject, sum(batch.tokens_BT.shape[0] for batch in rows)),
        positions=[place * chunk_size for place in places],
        loss_on=loss_on.mean,
        loss_off=loss_off.mean,
        gradient_norm=math.sqrt(gradient.total),
        layers=layers,
    )


def _checked_length(subject: Subject, rows: list[Batch]) -> int:
    """Tokens of a row, on every rank the same; what cannot be measured is refused here."""
    faults = []
    config, name = subject.config, subject.source.name
    if not ttt_layers(config) or TTTMode.in_place not in subject.modes:
        faults.append(Fault("ttt.mode", "off", f"health is that of fast weights; {name} has none"))
    if config.parallel.cp > 1:
        message = "must be 1 for health: no rank sees the states that enter another's tokens"
        faults.append(Fault("parallel.cp", config.parallel.cp, message))
    fewest = torch.tensor(len(rows), device=subject.ranks.device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=subject.ranks.groups.dp_cp)
    if not int(fewest):
        message = f"leaves some of {subject.ranks.data_size} data-parallel ranks without a row"
        faults.append(Fault("health.rows", _sum_over_data(subject, len(rows)), message))
    if faults:
        raise ConfigError(faults)
    length = rows[0].tokens_BT.shape[1]
    assert all(batch.tokens_BT.shape[1] == length for batch in rows), "rows of several lengths"
    if length <= config.ttt.chunk_size:
        message = f"is no longer than a chunk (ttt.chunk_size={config.ttt.chunk_size}): nothing is"
        raise ConfigError([Fault("health.length", length, f"{message} read back")])
    return length


def _sum_over_data(subject: Subject, number: int) -> int:
    total = torch.tensor(number, device=subject.ranks.device)
    dist.all_reduce(total, group=subject.ranks.groups.dp_cp)
    return int(total)


def _shares(gradient: GradientSquares, layer: int) -> dict[str, float]:
    if gradient.total == 0:
        return {}
    return {part: square / gradient.total for part, square in gradient.layers[layer].items()}


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
    step = forward_step(subject, TTTMode.off)
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
    settings = ddp_config(parallel, device_is_cuda=False)  # nothing overlaps
    wrapped = DistributedDataParallel(model.config, settings, model, pg_collection=groups)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped.zero_grad_buffer()
    step = forward_step(subject, TTTMode.in_place)
    sums = run_micro_batches(step, wrapped, iter(rows), micro_batches=len(rows), forward_only=False)
    return LossSum.over(subject.ranks, sums), _squares(subject)


def _squares(subject: Subject) -> GradientSquares:
    """Split parameters are summed over tensor ranks; the others are equal there, counted once."""
    named = dict(global_parameters(subject.model))
    own = torch.stack([main_gradient(one).double().square().sum() for one in named.values()])
    is_split = [sharded_dim(one) is not None for one in named.values()]
    split = torch.tensor(is_split, device=own.device)
    summed = own.clone()
    dist.all_reduce(summed, group=subject.ranks.groups.tp)
    squares = dict(zip(named, torch.where(split, summed, own).tolist(), strict=True))
    layers: dict[int, dict[str, float]] = {}
    for layer in subject.model.decoder.layers:
        number = layer.layer_number - 1
        names = {part: f"decoder.layers.{number}.{name}" for part, name in PARTS.items()}
        if isinstance(layer.mlp, FastWeightMLP):
            layers[number] = {part: squares[n] for part, n in names.items() if n in squares}
    return GradientSquares(layers, sum(squares.values()))


def main_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Return where Megatron's buffers gather a parameter's gradient."""
    gradient = getattr(parameter, "main_grad")  # noqa: B009
    assert isinstance(gradient, Tensor)
    return gradient
