"""One sample: a prompt of a wanted number of tokens, whatever the tokenizer, and its true answer.

The tasks are those of RULER (Hsieh et al., arXiv 2404.06654, section 3 and appendices A and B) in
words of our own. Pure Python, no torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_ttt.data.tokenizers import Tokenizer
from megatron_ttt.evaluation.ruler.answering import question_answering
from megatron_ttt.evaluation.ruler.haystack import Haystack
from megatron_ttt.evaluation.ruler.niah import niah
from megatron_ttt.evaluation.ruler.puzzle import Build, Match, Puzzle, Setting
from megatron_ttt.evaluation.ruler.tracing import variable_tracking
from megatron_ttt.evaluation.ruler.words import common_words, frequent_words


class RulerTask(Enum):
    """The kinds of RULER (arXiv 2404.06654), generated offline."""

    niah_single = "niah_single"
    niah_multikey = "niah_multikey"
    niah_multivalue = "niah_multivalue"
    niah_multiquery = "niah_multiquery"
    variable_tracking = "variable_tracking"
    common_words = "common_words"
    frequent_words = "frequent_words"
    question_answering = "question_answering"


BUILDERS: dict[RulerTask, Build] = {
    RulerTask.niah_single: niah(keys=1, values=1, queries=1),
    RulerTask.niah_multikey: niah(keys=4, values=1, queries=1),
    RulerTask.niah_multivalue: niah(keys=1, values=4, queries=1),
    RulerTask.niah_multiquery: niah(keys=4, values=1, queries=4),
    RulerTask.variable_tracking: variable_tracking,
    RulerTask.common_words: common_words,
    RulerTask.frequent_words: frequent_words,
    RulerTask.question_answering: question_answering,
}

# A context is full with this share of its tokens used: it costs a few encodings, not twenty.
_FULL = 0.995
_FIRST_STEP = 64  # units, to learn how many tokens one has
_GROWTH = 16
_GUESSES = 12  # then the range is halved: texts whose tokens are nowhere near a line
LONGEST = 2**20  # tokens; beyond, the lists of words would run out


class TooShort(ValueError):
    """No sample fits into so few tokens.

    Attributes:
        smallest: tokens of the shortest sample.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the shortest sample has {smallest} tokens")
        self.smallest = smallest


@dataclass(frozen=True)
class Sample:
    """What a model is asked.

    Attributes:
        prompt_ids: at least one token.
        answer_ids: what follows the prompt if all is known.
        answers: references that are looked for in the output.
        match: how.
        new_tokens: that may be generated; an answer needs half of them.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    answers: tuple[str, ...]
    match: Match
    new_tokens: int


def sample_rng(seed: int, task: RulerTask, length: int, number: int) -> random.Random:
    """All that is random in a sample: the same for every reading, layout and needle's depth."""
    return random.Random(f"{seed} {task.value} {length} {number}")


def make_sample(
    task: RulerTask,
    *,
    tokenizer: Tokenizer,
    length: int,
    rng: random.Random,
    haystack: Haystack,
    depth: float | None = None,
) -> Sample:
    """Return a sample whose prompt and new tokens come as close to ``length`` as its text allows.

    Args:
        length: tokens of the prompt and of what may be generated after it, ``LONGEST`` at most.
        rng: see :func:`sample_rng`.
        haystack: the text between needles.
        depth: of the only needle, 0 to 1; for ``niah_single``.

    Raises:
        TooShort: the question alone is longer.
    """
    puzzle = BUILDERS[task](rng, Setting(tokenizer, length, haystack, depth))
    answer_ids = _continuation(tokenizer, puzzle)
    new_tokens = 2 * len(answer_ids)
    least_ids = tokenizer.encode_prompt(puzzle.prompt(puzzle.smallest))
    if len(least_ids) + new_tokens > length:
        raise TooShort(len(least_ids) + new_tokens)
    prompt_ids = _filled(puzzle, tokenizer.encode_prompt, least_ids, budget=length - new_tokens)
    return Sample(prompt_ids, answer_ids, puzzle.answers, puzzle.match, new_tokens)


def smallest_length(
    task: RulerTask, *, tokenizer: Tokenizer, length: int, rng: random.Random, haystack: Haystack
) -> int:
    """Tokens of the shortest sample: ``make_sample`` with a shorter length raises ``TooShort``."""
    puzzle = BUILDERS[task](rng, Setting(tokenizer, length, haystack))
    prompt = tokenizer.encode_prompt(puzzle.prompt(puzzle.smallest))
    return len(prompt) + 2 * len(_continuation(tokenizer, puzzle))


def _filled(
    puzzle: Puzzle, encode: Callable[[str], list[int]], ids: list[int], *, budget: int
) -> list[int]:
    """Return the prompt with about the most units that fit into ``budget`` tokens.

    Tokens of a text are not the sum of its words' tokens, so whole prompts are encoded; how many
    units to try next follows from the line through what was found. Texts grow ``_GROWTH`` times at
    most, so that only the last of them are long.
    """
    aim = (1 + _FULL) / 2 * budget
    low, tries = puzzle.smallest, 0
    high: int | None = None  # too many units
    high_tokens = 0
    step = _FIRST_STEP
    while len(ids) < _FULL * budget and high != low + 1:
        tries += 1
        if high is None:
            units = low + min(step, _GROWTH * max(low, _FIRST_STEP))
        else:
            share = (aim - len(ids)) / (high_tokens - len(ids)) if tries < _GUESSES else 0.5
            units = min(high - 1, max(low + 1, low + int(share * (high - low))))
        found = encode(puzzle.prompt(units))
        if len(found) > budget:
            high, high_tokens = units, len(found)
        else:
            step = int((aim - len(found)) * (units - low) / max(1, len(found) - len(ids)))
            step = max(1, step)
            low, ids = units, found
    return ids


def _continuation(tokenizer: Tokenizer, puzzle: Puzzle) -> list[int]:
    """Return the answer's tokens behind the question's.

    Where a tokenizer would join the two across their border, the answer's own: a text that a
    model may write as well.
    """
    question = tokenizer.encode(puzzle.question)
    whole = tokenizer.encode(puzzle.question + puzzle.answer)
    if whole[: len(question)] == question:
        return whole[len(question) :]
    return tokenizer.encode(puzzle.answer)
