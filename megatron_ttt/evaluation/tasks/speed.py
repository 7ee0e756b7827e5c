"""Throughput and peak memory of prefill and decoding, with fast weights on and off.

Rounds with and without alternate in one process, so that what else the machine does falls on both
(In-Place TTT, arXiv 2604.06169, figure 4).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.report import MODE_NAMES, Report, Table
from megatron_ttt.evaluation.task import Reading, Task, Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ttt.conversion.opened import Checkpoint
    from megatron_ttt.evaluation.schema import EvaluationConfig
    from megatron_ttt.evaluation.subject import Subject
    from megatron_ttt.inference.model_session import ModelSession


@dataclass
class SpeedConfig:
    """Time and memory of reading prompts and of the tokens behind them."""

    lengths: list[int] = field(default_factory=lambda: [1024, 4096])  # tokens of the prompt
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    new_tokens: int = 64
    repeats: int = 5


@dataclass
class Timing:
    """One reading at one length and batch size: seconds of each round, peak bytes.

    ``prefill_peak`` counts what reading the prompt allocates at most (caches and states stay),
    ``decode_peak`` what the new tokens need beyond that.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    prefill_peak: int = 0
    decode_peak: int = 0


@dataclass(frozen=True)
class Measured:
    """All readings at one length (tokens of the prompt) and batch size."""

    length: int
    batch: int
    timings: dict[TTTMode, Timing]


def row_lengths(source: Checkpoint, settings: SpeedConfig) -> dict[str, list[int]]:
    """Return the tokens of each prompt with the new ones."""
    return {"speed.lengths": [length + settings.new_tokens for length in settings.lengths]}


def run(subject: Subject, settings: SpeedConfig, config: EvaluationConfig) -> Report:
    """Measure and report both readings; every rank measures, the first prints its own."""
    import torch

    device = subject.ranks.device
    with torch.no_grad():
        found = list(_measure(subject, settings))
    tables = [_table(found, "prefill", settings), _table(found, "decode", settings)]
    values = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "new_tokens": settings.new_tokens,
        "rounds": settings.repeats,
        "measured": [
            {
                "length": cell.length,
                "batch": cell.batch,
                **{mode.value: vars(timing) for mode, timing in cell.timings.items()},
            }
            for cell in found
        ],
    }
    return Report(tables, values, draw=partial(_draw, found, settings))


def _measure(subject: Subject, settings: SpeedConfig) -> Iterator[Measured]:
    vocabulary = range(subject.config.model.vocab_size)
    for batch in settings.batch_sizes:
        for length in settings.lengths:
            draw = random.Random(subject.seed)
            rows = [draw.choices(vocabulary, k=length) for _ in range(batch)]
            timings = {mode: Timing() for mode in subject.modes}
            for mode in subject.modes:  # also warms up
                _measure_memory(subject, mode, rows, settings, timings[mode])
            for _ in range(settings.repeats):
                for mode in subject.modes:
                    _measure_time(subject, mode, rows, settings, timings[mode])
            yield Measured(length, batch, timings)


def _measure_memory(
    subject: Subject, mode: TTTMode, rows: list[list[int]], settings: SpeedConfig, timing: Timing
) -> None:
    from megatron_ttt.evaluation.memory import peak_bytes

    session = subject.new_session(mode, batch=len(rows))
    device = subject.ranks.device
    timing.prefill_peak = peak_bytes(lambda: session.read(rows), device)
    timing.decode_peak = peak_bytes(lambda: _decode(session, settings.new_tokens), device)


def _measure_time(
    subject: Subject, mode: TTTMode, rows: list[list[int]], settings: SpeedConfig, timing: Timing
) -> None:
    session = subject.new_session(mode, batch=len(rows))
    began = time.perf_counter()
    float(session.read(rows).sum())  # waits for the device
    read = time.perf_counter()
    _decode(session, settings.new_tokens)
    timing.prefill_s.append(read - began)
    timing.decode_s.append(time.perf_counter() - read)


def _decode(session: ModelSession, new_tokens: int) -> None:
    for _ in range(new_tokens):
        logits = session.read([[0]] * session.batch)
    float(logits.sum())  # waits for the device


def _table(found: list[Measured], part: str, settings: SpeedConfig) -> Table:
    """Medians of the rounds; the ratio's spread is that of the rounds, which are paired."""
    modes = list(found[0].timings)
    rate = "tokens/s" if part == "prefill" else "ms/token"
    columns: list[tuple[str, str]] = [("prompt", "d"), ("batch", "d")]
    columns += [(f"{MODE_NAMES[mode]}, {rate}", ",.1f") for mode in modes]
    columns += [(f"{MODE_NAMES[mode]}, peak MB", ",.1f") for mode in modes]
    compares = len(modes) == 2
    if compares:
        columns += [("time, on / off", ".3f"), ("least", ".3f"), ("most", ".3f")]
    body: list[list[Any]] = []
    for cell in found:
        row: list[Any] = [cell.length, cell.batch]
        row += [_rate(cell, mode, part, settings) for mode in modes]
        row += [getattr(cell.timings[mode], f"{part}_peak") / 1e6 for mode in modes]
        if compares:
            row += _ratio(cell, part)
        body.append(row)
    title = f"{part.capitalize()}, medians of {settings.repeats} alternating rounds"
    return Table(title, columns, body)


def _rate(cell: Measured, mode: TTTMode, part: str, settings: SpeedConfig) -> float:
    """Tokens a second of all rows together, or milliseconds a step of one token a row."""
    timing = cell.timings[mode]
    if part == "prefill":
        return cell.length * cell.batch / median(timing.prefill_s)
    return 1e3 * median(timing.decode_s) / settings.new_tokens


def _ratio(cell: Measured, part: str) -> list[float]:
    on, off = (getattr(timing, f"{part}_s") for timing in cell.timings.values())
    ratios = [one / other for one, other in zip(on, off, strict=True)]
    return [median(ratios), min(ratios), max(ratios)]


def _draw(found: list[Measured], settings: SpeedConfig) -> Figure:
    """Draw prefill and decoding by prompt length, one line a reading and batch size."""
    from megatron_ttt.evaluation.drawing import finish, panels, reading, token_axis

    figure, ((left, right),) = panels(2)
    lengths = sorted({cell.length for cell in found})
    for order, batch in enumerate(sorted({cell.batch for cell in found})):
        cells = sorted((c for c in found if c.batch == batch), key=lambda cell: cell.length)
        places = [cell.length for cell in cells]
        for mode in found[0].timings:
            style = reading(mode, f", batch {batch}")
            style["linestyle"] = ("-", "--", ":", "-.")[order % 4]
            for axes, part in ((left, "prefill"), (right, "decode")):
                axes.plot(places, [_rate(cell, mode, part, settings) for cell in cells], **style)
    left.set(title="Prefill", ylabel="tokens/s, all rows")
    right.set(title="Decoding", ylabel="ms a token and step")
    for axes in (left, right):
        axes.set(xlabel="prompt, tokens", ylim=(0, None))
        token_axis(axes, lengths)
    return finish(figure)


TASK = Task(
    settings=SpeedConfig,
    reading=Reading.SESSION,
    text=Text.RANDOM,
    lengths=row_lengths,
    run=run,
    bounds=dict.fromkeys(("lengths", "batch_sizes", "new_tokens", "repeats"), COUNT),
)
