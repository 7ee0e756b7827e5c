"""All figures of a health report: of states, of the gradient, of the loss without fast weights.

One training step's forward and backward over the rows, without an optimizer, gives every figure
(``health_probe.py``, ``health_gradient.py``), a second forward without fast weights the loss to
compare with.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.data.rows import Batch
from megatron_ttt.evaluation.health_advice import Health, LayerHealth
from megatron_ttt.evaluation.health_gradient import (
    GradientSquares,
    loss_and_gradient,
    loss_without_fast_weights,
)
from megatron_ttt.evaluation.health_probe import FIGURES, StateProbe, chosen_places
from megatron_ttt.evaluation.subject import Subject


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
