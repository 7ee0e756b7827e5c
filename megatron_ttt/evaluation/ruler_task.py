"""The task ``ruler``: eight kinds of questions about long contexts, with fast weights on and off.

The questions are generated (``ruler/``), after Hsieh et al., arXiv 2404.06654.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

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
from megatron_ttt.evaluation.report import MODE_COLOURS, MODE_NAMES, Report, Table
from megatron_ttt.evaluation.schema import EvaluationConfig, RulerConfig, RulerTask
from megatron_ttt.evaluation.subject import Subject

_ALL = "all tasks"
Groups = dict[tuple[str, int], list[Answered]]


def run_ruler(subject: Subject, config: EvaluationConfig) -> Report:
    """The task ``ruler``; called on every rank."""
    settings = config.ruler
    answered = ask(
        subject,
        ruler_items(settings),
        haystack=open_haystack(settings.haystack, key="ruler.haystack"),
        batch_size=settings.batch_size,
        key="ruler.lengths",
    )
    groups = _groups(answered)
    values = {
        "haystack": settings.haystack,
        "samples": settings.samples,
        "cells": [
            {"task": name, "length": length, **means(some, subject.modes)}
            for (name, length), some in groups.items()
        ],
        "results": [one.values() for one in answered],
    }
    tables = [_table(groups, subject.modes, samples=settings.samples)]
    return Report(tables, values, draw=partial(_draw, groups, subject.modes))


def ruler_items(settings: RulerConfig) -> list[Item]:
    """Every sample, short ones first."""
    return [
        Item(task, length, number)
        for length in sorted(set(settings.lengths))
        for task in dict.fromkeys(settings.tasks or RulerTask)
        for number in range(settings.samples)
    ]


def _groups(answered: Sequence[Answered]) -> Groups:
    """By task and length; where there are several tasks, their samples together come first."""
    groups: Groups = {}
    for one in answered:
        groups.setdefault((one.item.task.value, one.item.length), []).append(one)
    if len({task for task, _ in groups}) > 1:
        together: Groups = {}
        for one in answered:
            together.setdefault((_ALL, one.item.length), []).append(one)
        groups = together | groups
    return groups


def _table(groups: Groups, modes: Sequence[TTTMode], *, samples: int) -> Table:
    columns = [("task", ""), ("length", "d"), *comparison_columns(modes)]
    body: list[list[Any]] = [
        [name, length, *comparison(some, modes)] for (name, length), some in groups.items()
    ]
    title = f"RULER-style tasks, {samples} samples each: score, loss of the answer in nats"
    return Table(title, columns, body)


def _draw(groups: Groups, modes: Sequence[TTTMode]) -> Figure:
    """Scores above answer losses: by length, one column a task; bars if there is one length."""
    names = list(dict.fromkeys(name for name, _ in groups))
    lengths = sorted({length for _, length in groups})
    if len(lengths) == 1:
        return _draw_bars(groups, names, lengths[0], modes)
    wide = max(2, len(names))
    figure = Figure(figsize=(1.2 + 1.75 * wide, 4.6), layout="constrained")
    grid = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(names):
        for mode in modes:
            style = {"color": MODE_COLOURS[mode], "marker": "o", "markersize": 3}
            cells = [groups[name, length] for length in lengths]
            scores = [100 * mean_score(some, mode) for some in cells]
            losses = [mean_loss(some, mode) for some in cells]
            grid[0][column].plot(lengths, scores, label=MODE_NAMES[mode], **style)
            grid[1][column].plot(lengths, losses, **style)
        grid[0][column].set_title(name.replace("_", " "), fontsize=9)
        _by_length(grid[1][column], lengths)
    grid[0][0].set(ylabel="score, %", ylim=(-4, 104))
    grid[1][0].set(ylabel="answer loss, nats a token")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    figure.supxlabel("length, tokens", fontsize=9)
    _legend(figure, grid[0][0])
    return figure


def _draw_bars(
    groups: Groups, names: Sequence[str], length: int, modes: Sequence[TTTMode]
) -> Figure:
    figure = Figure(figsize=(10, 1.4 + 0.45 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for order, mode in enumerate(modes):
        style = {"height": 0.8 / len(modes), "color": MODE_COLOURS[mode]}
        places = [
            row + (order - (len(modes) - 1) / 2) * 0.8 / len(modes) for row in range(len(names))
        ]
        cells = [groups[name, length] for name in names]
        label = MODE_NAMES[mode]
        scores = left.barh(places, [100 * mean_score(c, mode) for c in cells], label=label, **style)
        losses = right.barh(places, [mean_loss(c, mode) for c in cells], **style)
        left.bar_label(scores, fmt="%.0f", padding=2, fontsize=7)
        right.bar_label(losses, fmt="%.2f", padding=2, fontsize=7)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.invert_yaxis()
    left.set(xlabel="score, %", xlim=(0, 108))
    right.set(xlabel="answer loss, nats a token")
    right.margins(x=0.12)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    figure.suptitle(f"Contexts of {length} tokens", fontsize=10)
    _legend(figure, left)
    return figure


def _by_length(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    labels = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes.set_xticks(lengths, labels, fontsize=7)
    axes.minorticks_off()


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False)
