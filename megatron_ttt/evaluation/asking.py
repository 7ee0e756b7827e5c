"""Samples asked of a model: what it writes, and how likely it finds the true answer.

Two figures per sample and reading. ``score`` is RULER's: the share of the references that occur in
what greedy decoding writes. ``answer_loss`` is the loss of the true answer behind the prompt, nats
a token: it tells models apart that write nothing useful. One prefill serves both: the session is
marked, reads the answer, goes back and writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.data.tokenizers import Tokenizer
from megatron_ttt.evaluation.report import MODE_NAMES
from megatron_ttt.evaluation.ruler.haystack import Haystack
from megatron_ttt.evaluation.ruler.sample import (
    LONGEST,
    RulerTask,
    Sample,
    make_sample,
    sample_rng,
    smallest_length,
)
from megatron_ttt.evaluation.ruler.scoring import string_match
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.inference.generation import generate
from megatron_ttt.inference.model_session import LogitsOf
from megatron_ttt.inference.sampling import Sampler, Sampling


@dataclass(frozen=True)
class Item:
    """Names one sample; ``depth`` is of the only needle, or None."""

    task: RulerTask
    length: int
    number: int
    depth: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one reading of a sample gave.

    Attributes:
        score: 0 to 1.
        answer_loss: nats a token.
        output: what was written.
    """

    score: float
    answer_loss: float
    output: str


@dataclass(frozen=True)
class Answered:
    """A sample and all its replies."""

    item: Item
    prompt_tokens: int
    answers: tuple[str, ...]
    replies: dict[TTTMode, Reply]

    def values(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "task": self.item.task.value,
            "length": self.item.length,
            "number": self.item.number,
            "depth": self.item.depth,
            "prompt_tokens": self.prompt_tokens,
            "answers": list(self.answers),
            **{mode.value: vars(reply) for mode, reply in self.replies.items()},
        }


def open_haystack(path: str | None, *, key: str) -> Haystack:
    """Return the text file, or noise where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    if path is None:
        return Haystack.noise()
    try:
        return Haystack.from_file(path)
    except ValueError as error:
        raise ConfigError([Fault(key, path, str(error))]) from error


def ask(
    subject: Subject, items: Sequence[Item], *, haystack: Haystack, batch_size: int, key: str
) -> list[Answered]:
    """Every item under every reading; called on every rank, the same result on every rank.

    Items are dealt to data-parallel ranks one by one; tensor- and context-parallel ranks read
    together. Ranks wait for each other at the end alone.

    Args:
        subject: the model.
        items: samples, equal on every rank; those of one length lie next to each other.
        haystack: the text between needles.
        batch_size: samples of one length that a rank reads at a time.
        key: the configuration key that lengths come from.

    Raises:
        ConfigError: no tokenizer, one with more tokens than the model, or a length that a task
            cannot be made for; on every rank.
    """
    tokenizer = _tokenizer(subject)
    _check_lengths(subject, items, tokenizer, haystack, key)
    ranks = subject.ranks
    mine = list(range(ranks.data_rank, len(items), ranks.data_size))
    found: dict[int, Answered] = {}
    with _progress(subject) as progress:
        task = progress.add_task("samples", total=len(mine) * len(subject.modes))
        for numbers in _batches(items, mine, batch_size):
            batch = [items[number] for number in numbers]
            samples = [_sample(subject, item, tokenizer, haystack) for item in batch]
            replies: list[dict[TTTMode, Reply]] = [{} for _ in batch]
            for mode in subject.modes:
                for row, reply in enumerate(_replies(subject, mode, samples, tokenizer)):
                    replies[row][mode] = reply
                progress.advance(task, len(batch))
            for number, sample, both in zip(numbers, samples, replies, strict=True):
                tokens = len(sample.prompt_ids)
                found[number] = Answered(items[number], tokens, sample.answers, both)
    parts: list[dict[int, Answered]] = [{} for _ in range(ranks.data_size)]
    dist.all_gather_object(parts, found, group=ranks.groups.dp)
    whole = {number: answered for part in parts for number, answered in part.items()}
    return [whole[number] for number in range(len(items))]


@torch.no_grad()
def _replies(
    subject: Subject, mode: TTTMode, samples: Sequence[Sample], tokenizer: Tokenizer
) -> Iterator[Reply]:
    """One prefill of all but the prompts' last token, then the answer, then decoding."""
    session = subject.new_session(mode, batch=len(samples))
    session.read([sample.prompt_ids[:-1] for sample in samples])
    mark = session.mark()
    last = [sample.prompt_ids[-1:] for sample in samples]
    rows = [one + sample.answer_ids[:-1] for one, sample in zip(last, samples, strict=True)]
    logits_BTW = session.read(rows, logits=LogitsOf.ALL)
    losses = []
    for logits_TW, sample in zip(logits_BTW, samples, strict=True):
        answer_A = torch.tensor(sample.answer_ids, device=logits_TW.device)
        logits_AV = logits_TW[: len(answer_A), : subject.config.model.vocab_size].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits_AV, answer_A)))
    del logits_BTW
    session.rewind(mark)
    written = generate(
        session,
        last,
        sampler=Sampler(Sampling()),
        max_new_tokens=max(sample.new_tokens for sample in samples),
        stop_tokens={tokenizer.eod},
    )
    for sample, loss, tokens in zip(samples, losses, written.tokens, strict=True):
        output = tokenizer.decode(tokens[: sample.new_tokens])
        yield Reply(string_match(output, sample.answers, sample.match), loss, output)


def _tokenizer(subject: Subject) -> Tokenizer:
    tokenizer, known = subject.need_tokenizer(), subject.config.model.vocab_size
    if tokenizer.vocab_size > known:
        name = tokenizer.identity.name or tokenizer.identity.kind
        message = f"has {tokenizer.vocab_size} tokens, and {subject.source.name} knows {known}"
        raise ConfigError([Fault("data.tokenizer", name, message)])
    return tokenizer


def _sample(subject: Subject, item: Item, tokenizer: Tokenizer, haystack: Haystack) -> Sample:
    return make_sample(
        item.task,
        tokenizer=tokenizer,
        length=item.length,
        rng=sample_rng(subject.seed, item.task, item.length, item.number),
        haystack=haystack,
        depth=item.depth,
    )


def _check_lengths(
    subject: Subject, items: Iterable[Item], tokenizer: Tokenizer, haystack: Haystack, key: str
) -> None:
    """Whether every sample can be made: before any is, and on ranks that read others too."""
    shortest: dict[tuple[RulerTask, int], int] = {}
    for task, length, number in dict.fromkeys((i.task, i.length, i.number) for i in items):
        if length > LONGEST:
            raise ConfigError([Fault(key, length, f"samples have {LONGEST} tokens at most")])
        rng = sample_rng(subject.seed, task, length, number)
        needed = smallest_length(
            task, tokenizer=tokenizer, length=length, rng=rng, haystack=haystack
        )
        shortest[task, length] = max(needed, shortest.get((task, length), 0))
    faults = [
        Fault(key, length, f"{task.name} takes about {needed} tokens at least")
        for (task, length), needed in shortest.items()
        if needed > length
    ]
    if faults:
        raise ConfigError(faults)


def _batches(items: Sequence[Item], numbers: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Up to ``batch_size`` numbers of items of one length at a time."""
    for _, alike in groupby(numbers, key=lambda number: items[number].length):
        some = list(alike)
        for first in range(0, len(some), batch_size):
            yield some[first : first + batch_size]


def _progress(subject: Subject) -> Progress:
    """Return a bar on the first rank, where a person is watching."""
    console = Console()
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (subject.ranks.is_first and console.is_terminal),
    )


def comparison_columns(modes: Sequence[TTTMode]) -> list[tuple[str, str]]:
    """Return the columns of ``comparison``: score (percent) and answer loss of each reading."""
    names = [MODE_NAMES[mode].removeprefix("ttt ") for mode in modes]
    columns = [(f"{name}, %", ".1f") for name in names]
    columns += [(f"{name}, loss", ".3f") for name in names]
    if len(modes) == 2:
        columns += [("on-off", "+.3f"), ("± s.e.", ".3f")]
    return columns


def comparison(answered: Sequence[Answered], modes: Sequence[TTTMode]) -> list[Any]:
    """Return a row of a table: means over samples, and over the samples' differences."""
    row: list[Any] = [100 * mean_score(answered, mode) for mode in modes]
    row += [mean_loss(answered, mode) for mode in modes]
    if len(modes) == 2:
        pairs = [[one.replies[mode].answer_loss for mode in modes] for one in answered]
        differences = [on - off for on, off in pairs]
        several = len(differences) > 1  # one sample says nothing about others
        error = stdev(differences) / math.sqrt(len(differences)) if several else None
        row += [fmean(differences), error]
    return row


def mean_score(answered: Sequence[Answered], mode: TTTMode) -> float:
    """Return the mean over samples, 0 to 1."""
    return fmean(one.replies[mode].score for one in answered)


def mean_loss(answered: Sequence[Answered], mode: TTTMode) -> float:
    """Return nats a token, every sample counting alike."""
    return fmean(one.replies[mode].answer_loss for one in answered)


def means(answered: Sequence[Answered], modes: Sequence[TTTMode]) -> dict[str, Any]:
    """Return both for the JSON file."""
    return {
        mode.value: {"score": mean_score(answered, mode), "answer_loss": mean_loss(answered, mode)}
        for mode in modes
    }
