"""The task ``health``: are the fast weights heard, do they drown what they live in, do they learn?

One training step's forward and backward over the rows, without an optimizer, gives every figure
(``health_probe.py``, ``health_gradient.py``), a second forward without fast weights the loss to
compare with; ``health_advice.py`` says what is out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.data.rows import Batch
from megatron_ttt.evaluation.health_advice import Health, LayerHealth, plain_values, warnings_of
from megatron_ttt.evaluation.health_gradient import (
    PARTS,
    GradientSquares,
    loss_and_gradient,
    loss_without_fast_weights,
)
from megatron_ttt.evaluation.health_probe import FIGURES, StateProbe, chosen_places
from megatron_ttt.evaluation.report import Report, Table
from megatron_ttt.evaluation.schema import HealthConfig
from megatron_ttt.evaluation.subject import Subject

_HEARD, _BEARABLE = 0.05, 0.3  # update ratios for which a pretrained backbone is known to do well


def run_health(subject: Subject, rows: list[Batch], settings: HealthConfig) -> Report:
    """The task ``health``; called on every rank.

    Args:
        subject: the model.
        rows: this data-parallel rank's micro-batches, whole rows of one length.
        settings: how many places along the row are looked at.

    Raises:
        ConfigError: no fast weights are read, the row is cut over ranks, it is one chunk, or some
            data-parallel rank has no row.
    """
    length = _checked_length(subject, rows)
    health = measure_health(subject, rows, length=length, positions=settings.positions)
    return Report(
        tables=[_loss_table(health), _state_table(health), _gradient_table(health)],
        values=plain_values(health),
        draw=partial(_draw, health),
        warnings=warnings_of(health),
    )


def measure_health(subject: Subject, rows: list[Batch], *, length: int, positions: int) -> Health:
    """All figures, equal on every rank."""
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


def _loss_table(health: Health) -> Table:
    columns = [
        ("ttt on", ".4f"),
        ("ttt off", ".4f"),
        ("on - off", "+.4f"),
        ("gradient norm", ".3g"),
    ]
    difference = health.loss_on - health.loss_off
    row = [health.loss_on, health.loss_off, difference, health.gradient_norm]
    title = f"Loss, nats a token, {health.rows} rows of {health.length} tokens"
    return Table(title, columns, [row])


def _state_table(health: Health) -> Table:
    columns = [
        ("layer", "d"),
        ("tokens read", "d"),
        ("update ratio", ".3g"),
        ("output ratio", ".3g"),
        ("effective rank", ".1f"),
        ("of at most", "d"),
        ("mean-key share", ".3f"),
    ]
    body = [
        [
            layer.layer,
            position,
            layer.update_ratio[place],
            layer.output_ratio[place],
            layer.effective_rank[place],
            layer.largest_rank,
            layer.mean_key_share[place],
        ]
        for layer in health.layers
        for place, position in enumerate(health.positions)
    ]
    cells = [[None if v is not None and math.isnan(v) else v for v in row] for row in body]
    return Table("States along the row, means over rows", columns, cells)


def _gradient_table(health: Health) -> Table:
    columns = [("share of the squared gradient norm", ""), *((part, ".3%") for part in PARTS)]
    columns.append(("together", ".3%"))
    body: list[list[object]] = []
    elsewhere = 1.0
    for layer in health.layers:
        shares = [layer.gradient_shares.get(part) for part in PARTS]
        together = sum(share for share in shares if share is not None)
        elsewhere -= together
        body.append([f"layer {layer.layer}", *shares, together])
    body.append(["everything else", *([None] * len(PARTS)), elsewhere])
    return Table("Where the gradient lies", columns, body)


def _draw(health: Health) -> Figure:
    """Four figures along the row, one line a layer, and where the gradient lies."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplot_mosaic("uog;rmg", width_ratios=[1, 1, 0.8])
    colours = _layer_colours(len(health.layers))
    for name, key, title in (
        ("u", "update_ratio", "Update ratio: norm(ηS) / norm(W0)"),
        ("o", "output_ratio", "Output ratio: norm(ηSz) / norm(W0z)"),
        ("r", "effective_rank", f"Effective rank of S, at most {health.layers[0].largest_rank}"),
        ("m", "mean_key_share", "Share of a write along the mean key"),
    ):
        axes = panels[name]
        for layer, colour in zip(health.layers, colours, strict=True):
            values = getattr(layer, key)
            label = f"layer {layer.layer}"
            axes.plot(health.positions, values, label=label, color=colour, marker="o", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    panels["u"].axhspan(_HEARD, _BEARABLE, color="#15803d", alpha=0.12, linewidth=0)
    panels["u"].legend(frameon=False, fontsize=8)
    panels["m"].set_ylim(0, 1)
    for name in ("r", "m"):
        panels[name].set_xlabel("tokens read")
    _draw_gradient(panels["g"], health)
    figure.suptitle(
        f"{health.rows} rows of {health.length} tokens; loss {health.loss_on:.4f} with fast"
        f" weights, {health.loss_off:.4f} without (green: what pretrained weights bear)",
        fontsize=10,
    )
    return figure


def _draw_gradient(axes: Axes, health: Health) -> None:
    """Horizontal bars, a group a layer, first layer on top."""
    height = 0.8 / len(PARTS)
    for number, (part, colour) in enumerate(
        zip(PARTS, ("#c2410c", "#0369a1", "#475569"), strict=True)
    ):
        places = [place + (number - 1) * height for place in range(len(health.layers))]
        shares = [layer.gradient_shares.get(part, 0.0) for layer in health.layers]
        axes.barh(places, shares, height=height, label=part, color=colour)
    axes.set_yticks(range(len(health.layers)), [f"layer {one.layer}" for one in health.layers])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Share of the squared gradient norm", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def _layer_colours(number: int) -> Sequence[tuple[float, ...]]:
    """From the first layer to the last, dark to light, none too light for paper."""
    return [colormaps["viridis"](0.85 * place / max(number - 1, 1)) for place in range(number)]
