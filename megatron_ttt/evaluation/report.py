"""What an evaluation leaves behind: tables for the terminal, one JSON file, one picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from megatron_ttt.config.schema import TTTMode
from megatron_ttt.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODE_NAMES = {TTTMode.in_place: "ttt on", TTTMode.off: "ttt off"}


@dataclass(frozen=True)
class Table:
    """Rows as they are printed: numbers are formatted by the column, None is an empty cell.

    Attributes:
        title: what is shown, with units.
        columns: heading and format of each column (``""`` for text, else as for ``format``).
        rows: values in the columns' order.
    """

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Any]]

    def rich(self) -> RichTable:
        """For a terminal: headings may wrap, values never do."""
        cells = [
            [
                "" if v is None else format(v, form)
                for v, (_, form) in zip(row, self.columns, strict=True)
            ]
            for row in self.rows
        ]
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for place, (heading, form) in enumerate(self.columns):
            widest = max((len(row[place]) for row in cells), default=1)
            justify: Literal["left", "right"] = "left" if form == "" else "right"
            table.add_column(heading, justify=justify, min_width=widest)
        for row in cells:
            table.add_row(*row)
        return table


@dataclass
class Report:
    """The result of one task, complete on the first rank.

    Attributes:
        tables: for the terminal.
        values: everything in them and more, for the JSON file.
        draw: draws the picture.
        warnings: each with advice, one line.
    """

    tables: list[Table]
    values: dict[str, Any]
    draw: Callable[[], Figure] | None = None
    warnings: list[str] = field(default_factory=list)


def print_report(report: Report, console: Console) -> None:
    """Tables, then warnings."""
    for table in report.tables:
        console.print(Text(table.title, style="bold"), soft_wrap=True)
        console.print(table.rich())
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def write_report(report: Report, folder: Path, *, name: str, about: dict[str, Any]) -> list[Path]:
    """``NAME.json`` and ``NAME.png`` in ``folder``, each whole or as it was before.

    Args:
        report: what to write.
        folder: made if it is missing.
        name: of the task.
        about: which checkpoint, settings and versions the values belong to.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {**about, **report.values, "warnings": report.warnings}
    path = folder / f"{name}.json"
    with replacing(path) as beside:
        beside.write_text(json.dumps(document, indent=1) + "\n")
    files = [path]
    if report.draw is not None:
        figure, path = report.draw(), folder / f"{name}.png"
        with replacing(path) as beside:
            figure.savefig(beside, format="png", dpi=150)
        files.append(path)
    return files
