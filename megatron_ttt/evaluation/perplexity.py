"""Loss by position, and perplexity by the length of the context, with fast weights on and off.

Loss by position tells what a model makes of what it has read: a model with a sliding window
stops gaining where the window ends, one that remembers goes on. Perplexity by context length asks
the same question of the same tokens: the last ``scored`` tokens of every row, after contexts of
different lengths (In-Place TTT, arXiv 2604.06169, figure 2).

Shape suffixes: N rows of the text, B rows of a micro-batch, T tokens of a row, R = T + 1, L tokens
of this rank, P bins of positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.documents import TextRows, batches, held_out_rows
from megatron_ttt.evaluation.report import MODE_COLOURS, MODE_NAMES, Report, Table
from megatron_ttt.evaluation.schema import EvaluationConfig, PerplexityConfig
from megatron_ttt.evaluation.subject import Source, Subject, row_length
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.model.sequence_layout import take_ranges
from megatron_ttt.training.step import ForwardStep

_CONTEXTS = 4  # context lengths that are compared when nobody says which


@dataclass(frozen=True)
class Lengths:
    """What ``perplexity.*`` comes to: tokens of a row, context lengths, scored tokens."""

    row: int
    contexts: tuple[int, ...]
    scored: int


def resolve_lengths(source: Source, settings: PerplexityConfig) -> Lengths:
    """The lengths of an evaluation; null follows the run that wrote the checkpoint.

    Raises:
        ConfigError: nobody says how long a row is, or a context is shorter than what it predicts.
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


@dataclass(frozen=True)
class Losses:
    """Sums of token losses (nats) and counts of counted tokens, ``[N, P]`` each, fp64, global."""

    total_NP: Tensor
    count_NP: Tensor

    def in_bins(self, bins: int) -> Losses:
        """The same in ``bins`` equal stretches of what are positions here."""
        total, count = (
            values.unflatten(1, (bins, -1)).sum(-1) for values in (self.total_NP, self.count_NP)
        )
        return Losses(total, count)

    def last(self, bins: int) -> float:
        """Loss per token over all rows' last ``bins``."""
        return float(self.total_NP[:, -bins:].sum() / self.count_NP[:, -bins:].sum())

    def by_bin(self) -> list[float]:
        """Loss per token in each bin, over all rows."""
        return (self.total_NP.sum(0) / self.count_NP.sum(0)).tolist()

    def mean(self) -> float:
        """Loss per token, over all rows and bins."""
        return float(self.total_NP.sum() / self.count_NP.sum())

    def error_of_difference(self, other: Losses) -> list[float]:
        """Standard error of the mean over rows of the difference, per bin: rows are paired."""
        difference_NP = self.total_NP / self.count_NP - other.total_NP / other.count_NP
        rows = len(difference_NP)
        if rows < 2:
            return [math.nan] * difference_NP.shape[1]
        return (difference_NP.std(dim=0) / math.sqrt(rows)).tolist()


@torch.no_grad()
def measure_losses(subject: Subject, text: TextRows, *, mode: TTTMode, batch_size: int) -> Losses:
    """Loss of predicting every token of the rows, in bins of one position.

    Called on every rank; rows are dealt to data-parallel ranks, each row's tokens to context-
    parallel ranks as in training.
    """
    config, ranks = subject.config, subject.ranks
    rows, length = text.tokens_NR.shape[0], text.tokens_NR.shape[1] - 1
    step = ForwardStep(
        config, ranks, scan=scan_settings(config.parallel, ranks.scan_group), mode=mode
    )
    sums_2NT = torch.zeros(2, rows, length, dtype=torch.float64, device=ranks.device)
    for batch in batches(text, subject=subject, batch_size=batch_size):
        ranges = step.layout(batch).ranges
        counted_BL = take_ranges(batch.loss_mask_BT, ranges).to(ranks.device)
        losses_BL, _ = step(iter([batch]), subject.model)
        found_2BL = torch.stack([losses_BL.double() * counted_BL, counted_BL.double()])
        first = 0
        for start, end in ranges:
            there = slice(first, first + end - start)
            sums_2NT[:, batch.sample_ids_B.to(ranks.device), start:end] = found_2BL[..., there]
            first += end - start
    dist.all_reduce(sums_2NT, group=ranks.groups.dp_cp)
    return Losses(sums_2NT[0].cpu(), sums_2NT[1].cpu())


def run_perplexity(subject: Subject, config: EvaluationConfig) -> Report:
    """The task ``perplexity``; called on every rank."""
    settings = config.perplexity
    lengths = resolve_lengths(subject.source, settings)
    text = held_out_rows(subject, config.data, length=lengths.row, rows=settings.rows)
    by_position: dict[TTTMode, Losses] = {}
    by_context: dict[TTTMode, list[float]] = {}
    for mode in subject.modes:
        measure = partial(measure_losses, subject, mode=mode, batch_size=settings.batch_size)
        whole = measure(text)
        by_position[mode] = whole.in_bins(settings.bins)
        by_context[mode] = [
            (whole if context == lengths.row else measure(_cut(text, context))).last(lengths.scored)
            for context in lengths.contexts
        ]
    rows = len(text.tokens_NR)
    tables = [
        _position_table(by_position, rows=rows, length=lengths.row),
        _context_table(by_context, lengths),
    ]
    values = _values(subject, by_position, by_context, lengths, rows=rows)
    values["text_sha256"] = text.digest()
    window = subject.config.model.sliding_window
    return Report(tables, values, draw=partial(_draw, values, subject.modes, window))


def _cut(text: TextRows, context: int) -> TextRows:
    """Each row's last ``context`` tokens and the label behind them."""
    return replace(text, tokens_NR=text.tokens_NR[:, -(context + 1) :])


def _position_table(losses: dict[TTTMode, Losses], *, rows: int, length: int) -> Table:
    modes = list(losses)
    binned = {mode: found.by_bin() for mode, found in losses.items()}
    bins = len(binned[modes[0]])
    columns = [("tokens", ""), *((MODE_NAMES[mode], ".4f") for mode in modes)]
    body: list[list[Any]] = []
    for place in range(bins):
        first, last = place * length // bins, (place + 1) * length // bins - 1
        body.append([f"{first}-{last}", *(binned[mode][place] for mode in modes)])
    body.append(["all", *(losses[mode].mean() for mode in modes)])
    if len(modes) == 2:
        on, off = losses[modes[0]], losses[modes[1]]
        columns += [("on - off", "+.4f"), ("± s.e.", ".4f")]
        for place, error in enumerate(on.error_of_difference(off)):
            body[place] += [binned[modes[0]][place] - binned[modes[1]][place], error]
        body[-1] += [on.mean() - off.mean(), None]
    return Table(f"Loss by position, nats a token, {rows} rows", columns, body)


def _context_table(by_context: dict[TTTMode, list[float]], lengths: Lengths) -> Table:
    columns = [("context", ""), *((MODE_NAMES[mode], ".3f") for mode in by_context)]
    body = [
        [str(context), *(math.exp(losses[place]) for losses in by_context.values())]
        for place, context in enumerate(lengths.contexts)
    ]
    title = f"Perplexity of the last {lengths.scored} tokens, by tokens of context"
    return Table(title, columns, body)


def _values(
    subject: Subject,
    by_position: dict[TTTMode, Losses],
    by_context: dict[TTTMode, list[float]],
    lengths: Lengths,
    *,
    rows: int,
) -> dict[str, Any]:
    """Everything the tables show, and what they are about."""
    bins = next(iter(by_position.values())).total_NP.shape[1]
    return {
        "length": lengths.row,
        "rows": rows,
        "sliding_window": subject.config.model.sliding_window,
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
    }


def _draw(values: dict[str, Any], modes: Sequence[TTTMode], window: int | None) -> Figure:
    """Loss by position beside perplexity by context length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    centres = [(first + last) / 2 for first, last in values["bins"]]
    for mode in modes:
        found, style = values["readings"][mode.value], {"marker": "o", "markersize": 3}
        label, colour = MODE_NAMES[mode], MODE_COLOURS[mode]
        left.plot(centres, found["loss_by_position"], label=label, color=colour, **style)
        perplexities = [math.exp(loss) for loss in found["loss_by_context"]]
        right.plot(values["contexts"], perplexities, label=label, color=colour, **style)
    if window is not None:
        left.axvline(window, color="0.6", linestyle=":", label=f"attention window, {window}")
    left.set(xlabel="position, tokens", ylabel="loss, nats a token", title="Loss by position")
    right.set(
        xlabel="context, tokens",
        ylabel="perplexity",
        title=f"The same last {values['scored']} tokens",
    )
    right.set_xscale("log", base=2)
    right.set_xticks(values["contexts"], [str(context) for context in values["contexts"]])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure
