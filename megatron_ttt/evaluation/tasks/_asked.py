"""What the tasks that ask questions share: their keys, their samples, their table and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ttt.evaluation.asking import Answered, Item
    from megatron_ttt.evaluation.subject import Subject

BOUNDS = dict.fromkeys(("lengths", "samples", "batch_size"), COUNT)
# Answered samples by what they are grouped by (a kind of question, a depth) and their length.
Cells = Mapping[tuple[Any, int], Sequence["Answered"]]


@dataclass
class AskedConfig:
    lengths: list[int] = field(default_factory=lambda: [4096])  # tokens, answer included
    samples: int = 20  # of each kind and length
    haystack: str | None = None  # text file to hide needles in; null: repeated noise
    batch_size: int = 1


def asked_report(
    subject: Subject,
    settings: AskedConfig,
    items: Sequence[Item],
    *,
    task: str,
    group: str,
    title: str,
    together: str | None,
    label_text: Callable[[Any], str],
    draw: Callable[[Cells, Sequence[TTTMode]], Figure],
) -> Report:
    """Ask every item and report by group and length.

    Args:
        subject: the model.
        settings: of the task.
        items: equal on every rank; those of one length lie next to each other.
        task: name of the task.
        group: the value of an answered sample by which samples are grouped.
        title: of the table.
        together: name of the group of all samples of a length; ``None``: there is none.
        label_text: a group's name in the table.
        draw: draws the picture.
    """
    from megatron_ttt.evaluation import asking

    answered = asking.ask(
        subject,
        items,
        haystack=asking.open_haystack(settings.haystack, key=f"{task}.haystack"),
        batch_size=settings.batch_size,
        key=f"{task}.lengths",
    )
    cells: dict[tuple[Any, int], list[Answered]] = {}
    if together is not None:
        for one in answered:
            cells.setdefault((together, one.item.length), []).append(one)
    for one in answered:
        cells.setdefault((one.values()[group], one.item.length), []).append(one)
    columns = [(group, ""), ("length", ""), *asking.comparison_columns(subject.modes)]
    rows = [
        [label_text(label), str(length), *asking.comparison(some, subject.modes)]
        for (label, length), some in cells.items()
    ]
    if together is None:
        rows.append(["all", "", *asking.comparison(answered, subject.modes)])
    values = {
        "haystack": settings.haystack,
        "samples": settings.samples,
        "cells": [
            {group: label, "length": length, **asking.means(some, subject.modes)}
            for (label, length), some in cells.items()
        ],
        "results": [one.values() for one in answered],
    }
    heading = f"{title}, {settings.samples} samples each: score, loss of the answer in nats"
    return Report([Table(heading, columns, rows)], values, draw=partial(draw, cells, subject.modes))
