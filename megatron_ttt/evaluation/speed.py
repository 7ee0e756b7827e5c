"""Throughput and peak memory of prefill and decoding, with fast weights on and off.

Rounds with and without alternate in one process, so that what else the machine does falls on both
(In-Place TTT, arXiv 2604.06169, figure 4).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.memory import peak_bytes
from megatron_ttt.evaluation.report import MODE_COLOURS, MODE_NAMES, Report, Table
from megatron_ttt.evaluation.schema import EvaluationConfig, SpeedConfig
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.inference.model_session import ModelSession


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


def run_speed(subject: Subject, config: EvaluationConfig) -> Report:
    """The task ``speed``; called on every rank, measured where it prints."""
    settings = config.speed
    found = list(_measure(subject, settings))
    tables = [_table(found, "prefill", settings), _table(found, "decode", settings)]
    values = {
        "device": _device_name(subject.ranks.device),
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


@torch.no_grad()
def _measure(subject: Subject, settings: SpeedConfig) -> Iterator[Measured]:
    vocabulary = subject.config.model.vocab_size
    for batch in settings.batch_sizes:
        for length in settings.lengths:
            generator = torch.Generator().manual_seed(subject.seed)
            rows = torch.randint(vocabulary, (batch, length), generator=generator).tolist()
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
    """Prefill and decoding by prompt length, one line a reading and batch size."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = sorted({cell.length for cell in found})
    for order, batch in enumerate(sorted({cell.batch for cell in found})):
        cells = sorted((c for c in found if c.batch == batch), key=lambda cell: cell.length)
        for mode in found[0].timings:
            style = {
                "label": f"{MODE_NAMES[mode]}, batch {batch}",
                "color": MODE_COLOURS[mode],
                "marker": "o",
                "linestyle": ("-", "--", ":", "-.")[order % 4],
            }
            places = [cell.length for cell in cells]
            for axes, part in ((left, "prefill"), (right, "decode")):
                axes.plot(places, [_rate(cell, mode, part, settings) for cell in cells], **style)
    left.set(title="Prefill", ylabel="tokens/s, all rows")
    right.set(title="Decoding", ylabel="ms a token and step")
    for axes in (left, right):
        axes.set(xlabel="prompt, tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
