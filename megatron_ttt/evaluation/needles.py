"""The task ``needles``: one needle at every depth of contexts of several lengths, as heat maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.asking import (
    Answered,
    Item,
    ask,
    comparison,
    comparison_columns,
    mean_loss,
    mean_score,
    means,
    open_haystack,
)
from megatron_ttt.evaluation.report import MODE_NAMES, Report, Table
from megatron_ttt.evaluation.schema import EvaluationConfig, NeedlesConfig, RulerTask
from megatron_ttt.evaluation.subject import Subject

Cells = dict[tuple[float, int], list[Answered]]  # by depth and length


def run_needles(subject: Subject, config: EvaluationConfig) -> Report:
    """The task ``needles``; called on every rank."""
    settings = config.needles
    answered = ask(
        subject,
        needle_items(settings),
        haystack=open_haystack(settings.haystack, key="needles.haystack"),
        batch_size=settings.batch_size,
        key="needles.lengths",
    )
    cells: Cells = {}
    for one in answered:
        assert one.item.depth is not None
        cells.setdefault((one.item.depth, one.item.length), []).append(one)
    values = {
        "haystack": settings.haystack,
        "samples": settings.samples,
        "cells": [
            {"depth": depth, "length": length, **means(some, subject.modes)}
            for (depth, length), some in cells.items()
        ],
        "results": [one.values() for one in answered],
    }
    tables = [_table(answered, cells, subject.modes, samples=settings.samples)]
    return Report(tables, values, draw=partial(_draw, cells, subject.modes))


def needle_items(settings: NeedlesConfig) -> list[Item]:
    """Every sample, short ones first; the samples of one length are the same at every depth."""
    return [
        Item(RulerTask.niah_single, length, number, depth)
        for length in sorted(set(settings.lengths))
        for depth in needle_depths(settings.depths)
        for number in range(settings.samples)
    ]


def needle_depths(count: int) -> list[float]:
    """``count`` depths evenly from 0 to 1; one: the middle."""
    return [place / (count - 1) for place in range(count)] if count > 1 else [0.5]


def _table(
    answered: Sequence[Answered], cells: Cells, modes: Sequence[TTTMode], *, samples: int
) -> Table:
    columns = [("length", ""), ("depth", ""), *comparison_columns(modes)]
    body = [
        [str(length), f"{depth:.2f}", *comparison(some, modes)]
        for (depth, length), some in cells.items()
    ]
    body.append(["all", "", *comparison(answered, modes)])
    title = f"One needle, {samples} samples each: score, loss of the answer in nats"
    return Table(title, columns, body)


@dataclass(frozen=True)
class Panel:
    """One heat map: values by depth and length, and the colours of its scale."""

    title: str
    values: list[list[float]]
    low: float
    high: float
    colours: str
    form: str


def _draw(cells: Cells, modes: Sequence[TTTMode]) -> Figure:
    """Scores of every reading, and what fast weights change of the answer's loss."""
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})

    def by_cell(value: Callable[[list[Answered]], float]) -> list[list[float]]:
        return [[value(cells[depth, length]) for length in lengths] for depth in depths]

    panels = [
        Panel(
            f"score, %, {MODE_NAMES[mode]}",
            by_cell(partial(_percent, mode=mode)),
            low=0,
            high=100,
            colours="YlGn",
            form=".0f",
        )
        for mode in modes
    ]
    panels.append(_loss_panel(by_cell, modes))
    width = 1.5 + max(1.8, 0.55 * len(lengths))
    figure = Figure(
        figsize=(0.6 + len(panels) * width, 1.6 + 0.28 * len(depths)), layout="constrained"
    )
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        _draw_panel(figure, axes, panel)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_xlabel("length, tokens")
    grid[0][0].set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths], fontsize=8)
    grid[0][0].set_ylabel("depth of the needle")
    return figure


def _percent(answered: list[Answered], mode: TTTMode) -> float:
    return 100 * mean_score(answered, mode)


def _loss_panel(
    by_cell: Callable[[Callable[[list[Answered]], float]], list[list[float]]],
    modes: Sequence[TTTMode],
) -> Panel:
    """The difference of two readings, as far one way as the other; of one reading its loss."""
    if len(modes) == 1:
        losses = by_cell(lambda some: mean_loss(some, modes[0]))
        high = max(max(row) for row in losses)
        return Panel("answer loss, nats a token", losses, 0, high, "Oranges", ".2f")
    on, off = modes
    losses = by_cell(lambda some: mean_loss(some, on) - mean_loss(some, off))
    reach = max(abs(value) for row in losses for value in row) or 1.0
    # Blue: the true answer is likelier with fast weights.
    return Panel("answer loss, nats a token, on - off", losses, -reach, reach, "RdBu_r", "+.2f")


def _draw_panel(figure: Figure, axes: Axes, panel: Panel) -> None:
    image = axes.imshow(
        panel.values, vmin=panel.low, vmax=panel.high, cmap=panel.colours, aspect="auto"
    )
    axes.set_title(panel.title, fontsize=10)
    colours = image.to_rgba(np.array(panel.values))
    for row, values in enumerate(panel.values):
        for column, value in enumerate(values):
            red, green, blue, _ = colours[row, column]
            bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
            colour = "black" if bright else "white"
            label = format(value, panel.form)
            axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, fraction=0.05, aspect=40).ax.tick_params(labelsize=7)
