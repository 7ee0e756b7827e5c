"""A stage of the trial: cells that are measured one after another, and the record of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from megatron_ttt.trial.words import Size, StageName


class Status(Enum):
    """How a stage ended."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        case: what was measured.
        figure: the result in words, as the table shows it.
        values: every number behind it.
    """

    case: str
    figure: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """What a stage is given: sizes, the device, and a folder for files of its own."""

    size: Size
    device: torch.device
    folder: Path

    @property
    def is_full(self) -> bool:
        return self.size is Size.full


class Skipped(Exception):
    """The machine lacks what the stage needs; the text says what."""


@dataclass(frozen=True)
class Stage:
    """A stage: its name, how many seconds it may take, and what yields its cells."""

    name: StageName
    limit_s: int
    cells: Callable[[Call], Iterator[Cell]]


@dataclass(frozen=True)
class Record:
    """What is written of a stage.

    Attributes:
        stage, size, device: what was asked.
        status: how it ended.
        reason: why it was skipped or failed; empty otherwise.
        seconds: it took.
        cells: measured until then.
    """

    stage: str
    size: str
    device: str
    status: str
    reason: str
    seconds: float
    cells: list[Cell]

    def as_json(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Record:
        """Undo :meth:`as_json`."""
        return cls(**{**known, "cells": [Cell(**cell) for cell in known["cells"]]})


def run_stage(stage: Stage, call: Call, note: Callable[[Cell], None]) -> Record:
    """Run a stage in this process; ``note`` is told every cell at once.

    What a stage raises ends it and not the trial: the record says it.
    """
    started, cells = time.monotonic(), list[Cell]()
    status, reason = Status.DONE, ""
    try:
        for cell in stage.cells(call):
            cells.append(cell)
            note(cell)
    except Skipped as why:
        status, reason = Status.SKIPPED, str(why)
    except Exception as error:  # whatever it is: this is the place that reports it
        status, reason = Status.FAILED, f"{type(error).__name__}: {last_line(str(error))}"
    seconds = time.monotonic() - started
    return Record(
        stage.name.value,
        call.size.value,
        call.device.type,
        status.value,
        reason,
        seconds,
        cells,
    )


def measured(case: str, measure: Callable[[], tuple[str, dict[str, Any]]]) -> Cell:
    """Return a cell; one that does not fit into the device's memory says so."""
    try:
        figure, values = measure()
    except torch.OutOfMemoryError as error:
        figure, values = "out of memory", {"error": last_line(str(error))}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Cell(case, figure, values)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
