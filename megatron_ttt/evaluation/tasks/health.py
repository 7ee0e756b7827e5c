"""The task ``health``: whether updates are too small, too large, or not training.

``health_figures.py`` measures, ``health_advice.py`` says what is out of range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.evaluation.health_advice import (
    BEARABLE,
    PARTS,
    Health,
    plain_values,
    warnings_of,
)
from megatron_ttt.evaluation.report import Report, Table
from megatron_ttt.evaluation.task import Reading, Task, Text, row_length
from megatron_ttt.rule import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ttt.conversion.opened import Checkpoint
    from megatron_ttt.evaluation.schema import EvaluationConfig
    from megatron_ttt.evaluation.subject import Subject


@dataclass
class HealthConfig:
    length: int | None = None  # tokens of a row; null: the length the checkpoint was trained at
    rows: int = 8
    positions: int = 8  # places along the row that are reported


def row_lengths(source: Checkpoint, settings: HealthConfig) -> dict[str, list[int]]:
    return {"health.length": [row_length(source, settings.length, key="health.length")]}


def run(subject: Subject, settings: HealthConfig, config: EvaluationConfig) -> Report:
    """Measure and report, one row a micro-batch, since the backward keeps its activations."""
    from megatron_ttt.evaluation.documents import batches, held_out_rows
    from megatron_ttt.evaluation.health_figures import measure_health

    (length,) = row_lengths(subject.source, settings)["health.length"]
    text = held_out_rows(subject, config.data, length=length, rows=settings.rows)
    rows = list(batches(text, subject=subject, batch_size=1))
    health = measure_health(subject, rows, positions=settings.positions)
    report = report_of(health, subject.config.ttt)
    report.values["text_sha256"] = text.digest()
    return report


def report_of(health: Health, rule: UpdateRule) -> Report:
    """Return tables, values and warnings; ``rule`` is the update rule in use."""
    return Report(
        tables=[_loss_table(health), _state_table(health), _gradient_table(health)],
        values=plain_values(health),
        draw=partial(_draw, health),
        warnings=warnings_of(health, rule),
    )


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
    along = ("update_ratio", "output_ratio", "effective_rank", "mean_key_share")
    body = []
    for layer in health.layers:
        for place, position in enumerate(health.positions):
            found = [getattr(layer, key)[place] for key in along]
            ratio, output, rank, share = (None if math.isnan(value) else value for value in found)
            body.append([layer.layer, position, ratio, output, rank, layer.largest_rank, share])
    return Table("States along the row, means over rows", columns, body)


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
    """Draw four figures along the row, one line a layer, and where the gradient lies."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from megatron_ttt.evaluation.drawing import BETTER, bars, finish, name_groups

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplot_mosaic("uog;rmg", width_ratios=[1, 1, 0.8])
    names = [f"layer {layer.layer}" for layer in health.layers]
    for name, key, title in (
        ("u", "update_ratio", "Update ratio: norm(ηS) / norm(W0)"),
        ("o", "output_ratio", "Output ratio: norm(ηSz) / norm(W0z)"),
        ("r", "effective_rank", f"Effective rank of S, at most {health.layers[0].largest_rank}"),
        ("m", "mean_key_share", "Share of a write along the mean key"),
    ):
        for number, layer in enumerate(health.layers):
            colour = colormaps["viridis"](0.85 * number / max(len(names) - 1, 1))
            label = names[number] if name == "u" else None
            values = getattr(layer, key)
            panels[name].plot(health.positions, values, label=label, color=colour, marker=".")
        panels[name].set_title(title, fontsize=10)
        panels[name].set(xlabel="tokens read", ylim=(0, 1 if name == "m" else None))
    panels["u"].axhspan(*BEARABLE, color=BETTER, alpha=0.12, linewidth=0)
    gradient = panels["g"]
    for place, (part, shade) in enumerate(
        zip(PARTS, ("#c2410c", "#0369a1", "#475569"), strict=True)
    ):
        shares = [layer.gradient_shares.get(part, 0.0) for layer in health.layers]
        bars(gradient, shares, place=place, of=len(PARTS), label=part, colour=shade)
    name_groups(gradient, names)
    gradient.xaxis.set_major_formatter(PercentFormatter(1.0))
    gradient.set_title("Share of the squared gradient norm", fontsize=10)
    figure.suptitle(
        f"{health.rows} rows of {health.length} tokens; loss {health.loss_on:.4f} with fast"
        f" weights, {health.loss_off:.4f} without (green: what pretrained weights bear)",
        fontsize=10,
    )
    return finish(figure)


TASK = Task(
    settings=HealthConfig,
    reading=Reading.ROWS,
    text=Text.HELD_OUT,
    lengths=row_lengths,
    run=run,
    bounds=dict.fromkeys(("length", "rows", "positions"), COUNT),
)
