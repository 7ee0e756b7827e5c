"""What the pictures of all evaluations share: panels, colours of the readings, axes of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.report import MODE_NAMES

MODE_COLOURS = {TTTMode.in_place: "#c2410c", TTTMode.off: "#475569"}
BETTER, WORSE = "#15803d", "#b91c1c"


def panels(
    columns: int, rows: int = 1, *, size: tuple[float, float] = (10, 4), **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes, ``[rows, columns]``; ``size`` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def reading(mode: TTTMode, suffix: str = "") -> dict[str, Any]:
    """Return label, colour and marker of a reading's line."""
    label = MODE_NAMES[mode] + suffix
    return {"label": label, "color": MODE_COLOURS[mode], "marker": "o", "markersize": 3}


def finish(figure: Figure, *, axis: str = "both") -> Figure:
    """Add a grid to every panel, and a legend to those with labels; return the figure."""
    for axes in figure.axes:
        axes.grid(alpha=0.3, axis=axis)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def token_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Show lengths in tokens as powers of two, labelled where they were measured."""
    axes.set_xscale("log", base=2)
    labels = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes.set_xticks(lengths, labels, fontsize=8)
    axes.minorticks_off()


def mark_window(axes: Axes, window: int | None) -> None:
    """Draw where the attention's window ends; nothing without one."""
    if window:
        axes.axvline(window, color="0.6", linestyle=":", label=f"attention window, {window}")


def bars(
    axes: Axes,
    values: Sequence[float],
    *,
    place: int,
    of: int,
    label: str,
    colour: str,
    form: str | None = None,
) -> None:
    """Draw one of ``of`` bars (number ``place``) of each group, first group on top.

    Args:
        values: one a group.
        form: of the numbers beside the bars; ``None``: no numbers.
    """
    height = 0.8 / of
    rows = [row + (place - (of - 1) / 2) * height for row in range(len(values))]
    drawn = axes.barh(rows, values, height=height, label=label, color=colour)
    if form is not None:
        axes.bar_label(drawn, fmt=form, padding=2, fontsize=7)


def name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Name the groups of :func:`bars`."""
    axes.set_yticks(range(len(names)), list(names), fontsize=8)
    axes.invert_yaxis()


@dataclass(frozen=True)
class Scale:
    """Ends of a scale of numbers, matplotlib's name of its colours, the form of the numbers."""

    limits: tuple[float, float]
    colours: str
    form: str


def heat_map(figure: Figure, axes: Axes, values: Sequence[Sequence[float]], scale: Scale) -> None:
    """Draw numbers, by row and column, on their colours, with the scale beside them."""
    low, high = scale.limits
    image = axes.imshow(values, vmin=low, vmax=high, cmap=scale.colours, aspect="auto")
    rgba = image.to_rgba(np.array(values))
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            bright = rgba[row, column, :3] @ (0.3, 0.6, 0.1) > 0.5
            text, colour = format(value, scale.form), "black" if bright else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, fraction=0.05, aspect=40).ax.tick_params(labelsize=7)
