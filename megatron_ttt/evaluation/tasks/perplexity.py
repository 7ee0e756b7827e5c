"""Loss by position, and perplexity by the length of the context, with fast weights on and off.

Loss by position tells what a model makes of what it has read: a model with a sliding window
stops gaining where the window ends, one that remembers goes on. Perplexity by context length asks
the same question of the same tokens: the last ``scored`` tokens of every row, after contexts of
different lengths (In-Place TTT, arXiv 2604.06169, figure 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.report import MODE_NAMES, Report, Table
from megatron_ttt.evaluation.task import Reading, Task, Text, Through, row_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ttt.conversion.opened import Checkpoint
    from megatron_ttt.evaluation.losses import Losses
    from megatron_ttt.evaluation.schema import EvaluationConfig
    from megatron_ttt.evaluation.subject import Subject

_CONTEXTS = 4  # context lengths that are compared where perplexity.contexts is null


@dataclass
class PerplexityConfig:
    """Loss by position, and by the length of the context before the same scored tokens."""

    length: int | None = None  # tokens of a row; null: the length the checkpoint was trained at
    rows: int = 64
    batch_size: int = 4
    bins: int = 16  # positions are averaged over length/bins tokens
    contexts: list[int] | None = None  # context lengths to compare; null: length, /2, /4, ...
    scored: int | None = None  # last tokens of a row that every context length predicts


@dataclass(frozen=True)
class Lengths:
    """What ``perplexity.*`` comes to: tokens of a row, context lengths, scored tokens."""

    row: int
    contexts: tuple[int, ...]
    scored: int


def resolve_lengths(source: Checkpoint, settings: PerplexityConfig) -> Lengths:
    """Return the lengths of an evaluation; null follows the run that wrote the checkpoint.

    Raises:
        ConfigError: the row's length is not known, or a context is shorter than what it predicts.
    """
    row = row_length(source, settings.length, key="perplexity.length")
    scored = settings.scored if settings.scored is not None else max(1, row // 2**_CONTEXTS)
    contexts = settings.contexts
    if contexts is None:
        contexts = [row // 2**power for power in range(_CONTEXTS) if row // 2**power >= scored]
    for context in contexts:
        if not scored <= context <= row:
            message = f"must lie between perplexity.scored={scored} and perplexity.length={row}"
            raise ConfigError([Fault("perplexity.contexts", context, message)])
    if row % settings.bins:
        message = f"must divide perplexity.length={row} evenly"
        raise ConfigError([Fault("perplexity.bins", settings.bins, message)])
    return Lengths(row, tuple(sorted(set(contexts))), scored)


def row_lengths(source: Checkpoint, settings: PerplexityConfig) -> dict[str, list[int]]:
    """Return the tokens of the rows, and of the contexts cut from them."""
    lengths = resolve_lengths(source, settings)
    return {"perplexity.length": [lengths.row], "perplexity.contexts": list(lengths.contexts)}


def run(subject: Subject, settings: PerplexityConfig, config: EvaluationConfig) -> Report:
    """Measure and report both readings."""
    from megatron_ttt.evaluation.documents import held_out_rows
    from megatron_ttt.evaluation.losses import measure_losses

    lengths = resolve_lengths(subject.source, settings)
    text = held_out_rows(subject, config.data, length=lengths.row, rows=settings.rows)
    by_position: dict[TTTMode, Losses] = {}
    by_context: dict[TTTMode, list[float]] = {}
    for mode in subject.modes:
        measure = partial(measure_losses, subject, mode=mode, batch_size=settings.batch_size)
        by_length = {lengths.row: measure(text)}
        by_position[mode] = by_length[lengths.row].in_bins(settings.bins)
        for context in lengths.contexts:  # each row's last tokens, and the label behind them
            if context not in by_length:
                cut = replace(text, tokens_NR=text.tokens_NR[:, -(context + 1) :])
                by_length[context] = measure(cut)
        by_context[mode] = [by_length[c].last(lengths.scored) for c in lengths.contexts]
    bins, window = settings.bins, subject.config.model.sliding_window
    values = {
        "length": lengths.row,
        "rows": len(text.tokens_NR),
        "sliding_window": window,
        "bins": [[b * lengths.row // bins, (b + 1) * lengths.row // bins] for b in range(bins)],
        "contexts": list(lengths.contexts),
        "scored": lengths.scored,
        "readings": {
            mode.value: {
                "loss": losses.mean(),
                "loss_by_position": losses.by_bin(),
                "loss_by_context": by_context[mode],
            }
            for mode, losses in by_position.items()
        },
        "text_sha256": text.digest(),
    }
    tables = [_position_table(by_position, values), _context_table(by_context, lengths)]
    return Report(tables, values, draw=partial(_draw, values, subject.modes, window))


def _position_table(losses: dict[TTTMode, Losses], values: dict[str, Any]) -> Table:
    modes = list(losses)
    columns = [("tokens", ""), *((MODE_NAMES[mode], ".4f") for mode in modes)]
    labels = [f"{first}-{end - 1}" for first, end in values["bins"]] + ["all"]
    figures = [[*found.by_bin(), found.mean()] for found in losses.values()]
    body: list[list[Any]] = [list(row) for row in zip(labels, *figures, strict=True)]
    if len(modes) == 2:
        on, off = losses.values()
        columns += [("on - off", "+.4f"), ("± s.e.", ".4f")]
        for row, error in zip(body, [*on.error_of_difference(off), None], strict=True):
            row += [row[1] - row[2], error]
    return Table(f"Loss by position, nats a token, {values['rows']} rows", columns, body)


def _context_table(by_context: dict[TTTMode, list[float]], lengths: Lengths) -> Table:
    columns = [("context", ""), *((MODE_NAMES[mode], ".3f") for mode in by_context)]
    body = [
        [str(context), *(math.exp(losses[place]) for losses in by_context.values())]
        for place, context in enumerate(lengths.contexts)
    ]
    title = f"Perplexity of the last {lengths.scored} tokens, by tokens of context"
    return Table(title, columns, body)


def _draw(values: dict[str, Any], modes: Sequence[TTTMode], window: int | None) -> Figure:
    """Draw loss by position beside perplexity by context length."""
    from megatron_ttt.evaluation.drawing import finish, mark_window, panels, reading, token_axis

    figure, ((left, right),) = panels(2)
    centres = [(first + last) / 2 for first, last in values["bins"]]
    for mode in modes:
        found = values["readings"][mode.value]
        left.plot(centres, found["loss_by_position"], **reading(mode))
        perplexities = [math.exp(loss) for loss in found["loss_by_context"]]
        right.plot(values["contexts"], perplexities, **reading(mode))
    mark_window(left, window)
    left.set(xlabel="position, tokens", ylabel="loss, nats a token", title="Loss by position")
    title = f"The same last {values['scored']} tokens"
    right.set(xlabel="context, tokens", ylabel="perplexity", title=title)
    token_axis(right, values["contexts"])
    return finish(figure)


TASK = Task(
    settings=PerplexityConfig,
    reading=Reading.ROWS,
    text=Text.HELD_OUT,
    lengths=row_lengths,
    run=run,
    through=frozenset(Through),
    bounds=dict.fromkeys(("length", "rows", "batch_size", "bins", "contexts", "scored"), COUNT),
)
