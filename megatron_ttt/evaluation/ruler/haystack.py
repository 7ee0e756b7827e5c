"""The text that needles are hidden in, word by word, and distinct random draws."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ttt.data.inputs import read_text
from megatron_ttt.evaluation.ruler.vocabulary import NOISE

_SENTENCE_ENDS = (".", "!", "?")
# A needle looks this many words back for the end of a sentence, then lies where it was put.
_LONGEST_SENTENCE = 40


@dataclass(frozen=True)
class Haystack:
    """Words that are repeated for ever."""

    words: tuple[str, ...]

    @classmethod
    def noise(cls) -> Haystack:
        """Return a few sentences about nothing."""
        return cls(tuple(NOISE.split()))

    @classmethod
    def from_file(cls, path: str) -> Haystack:
        """Return a text file; line breaks become spaces.

        Raises:
            ValueError: it cannot be read as UTF-8 text, or has no words.
        """
        words = read_text(path).split()
        if not words:
            raise ValueError("holds no words")
        return cls(tuple(words))

    def start(self, rng: random.Random) -> int:
        """Return some word that a sentence begins with."""
        return _sentence_start(self.words, rng.randrange(len(self.words)))

    def hiding(self, needles: Sequence[tuple[float, str]], *, first: int, words: int) -> str:
        """``words`` words from word ``first`` on, with needles between its sentences.

        Args:
            needles: depth (the share of the words before it) and text, in the order of the text.
            first: the first word's number; words are repeated from the start when they end.
            words: how many, besides the needles'.
        """
        start = first % len(self.words)
        repeated = self.words * (-(-(start + words) // len(self.words)))
        text = repeated[start : start + words]
        parts: list[str] = []
        done = 0
        for depth, needle in needles:
            place = max(done, _sentence_start(text, round(depth * words)))
            parts += [*text[done:place], needle]
            done = place
        return " ".join([*parts, *text[done:]])


def _sentence_start(words: Sequence[str], place: int) -> int:
    """Return the start of the sentence at ``place``; the very end stays the end."""
    if place == len(words):
        return place
    for start in range(place, max(-1, place - _LONGEST_SENTENCE), -1):
        if start == 0 or words[start - 1].endswith(_SENTENCE_ENDS):
            return start
    return place


class DistinctDraws:
    """Different random numbers below ``space``, the same ones however many are looked at."""

    def __init__(self, rng: random.Random, space: int) -> None:
        self._rng = random.Random(rng.getrandbits(64))
        self._space = space
        self._drawn: list[int] = []
        self._known: set[int] = set()

    def __getitem__(self, place: int) -> int:
        assert 2 * place <= self._space, f"number {place} of {self._space}: drawing would be slow"
        while place >= len(self._drawn):
            number = self._rng.randrange(self._space)
            if number not in self._known:
                self._known.add(number)
                self._drawn.append(number)
        return self._drawn[place]

    def between(self, start: int, end: int) -> list[int]:
        """Numbers ``start`` to ``end - 1``."""
        return [self[place] for place in range(start, end)]
