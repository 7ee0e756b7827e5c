"""What every kind of sample has in common: a text of any size that hides the answers, a question.

Pure Python, no torch. A puzzle grows by *units* (words, list entries, sentences), so that it can
be made as long as a context of any tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_ttt.data.tokenizers import Tokenizer
from megatron_ttt.evaluation.ruler.haystack import Haystack


class Match(Enum):
    """What a right output contains: ``ALL`` counts the references in it, ``ANY`` needs one."""

    ALL = "all"
    ANY = "any"


@dataclass(frozen=True)
class Setting:
    """What a puzzle is made for.

    Attributes:
        tokenizer: of the model.
        length: tokens of prompt and answer together.
        haystack: the text between the needles.
        depth: where the only needle lies, 0 the start and 1 the end; ``None``: anywhere.
    """

    tokenizer: Tokenizer
    length: int
    haystack: Haystack
    depth: float | None = None


@dataclass(frozen=True)
class Puzzle:
    """A sample before its size is known.

    Attributes:
        opening: what is going to be asked.
        context: the text of that many units; the same number gives the same text.
        smallest: the fewest units with which the question has its answer.
        question: the question and the first words of the answer, without a space at the end.
        answers: references, in the order of the true answer.
        match: how an output is scored.
    """

    opening: str
    context: Callable[[int], str]
    smallest: int
    question: str
    answers: tuple[str, ...]
    match: Match = Match.ALL

    @property
    def answer(self) -> str:
        """What follows the prompt if all is known."""
        return " " + ", ".join(self.answers)

    def prompt(self, units: int) -> str:
        """Return the whole text before the answer."""
        return f"{self.opening}\n\n{self.context(units)}\n\n{self.question}"


Build = Callable[[random.Random, Setting], Puzzle]
