"""Common and frequent words: what a long text holds most of (RULER, section 3.3).

``common_words``: ten words of a list stand in it often, all others rarely. ``frequent_words``:
made-up words whose counts fall with their rank as a power law; the most frequent one is noise.
"""

from __future__ import annotations

import random
import string
from math import pi

from megatron_ttt.evaluation.ruler.haystack import DistinctDraws
from megatron_ttt.evaluation.ruler.puzzle import Puzzle, Setting
from megatron_ttt.evaluation.ruler.vocabulary import ADJECTIVES, NOUNS

COMMON = 10
# How often a common and any other word stands in the list: the first that leaves half the length
# to the other words. The paper's own is the first.
_COUNTS = ((30, 3), (20, 2), (10, 1), (5, 1))
_EXAMPLE_COUNTS = (2, 5)  # of a common word; of words that stand once
_LONGEST_OF_PAIRS = 2**17  # tokens of a context beyond which words have three parts, to have enough

_COMMON_QUESTION = (
    f"Question: Which {COMMON} words stand most often in the list above, in alphabetical order?\n"
    f"Answer: The {COMMON} words that stand most often in the list above are"
)

FREQUENT = 3
_NOISE = "...."
_LETTERS = 6
# Counts are n * rank**-2 / zeta(2), rounded down: from here on the first five differ.
_FEWEST_CODED = 75
_ZETA_2 = pi**2 / 6


def common_words(rng: random.Random, setting: Setting) -> Puzzle:
    """Return a numbered list; a worked example with other words shows what is wanted."""
    parts = 2 if setting.length <= _LONGEST_OF_PAIRS else 3
    draws = DistinctDraws(rng, len(ADJECTIVES) ** (parts - 1) * len(NOUNS))
    often_shown, once_shown = _EXAMPLE_COUNTS
    skipped = COMMON + once_shown

    def words(start: int, end: int) -> list[str]:
        return [_word(number, parts) for number in draws.between(start, end)]

    shown = words(0, COMMON)
    example = _list(rng.getrandbits(64), often_shown * shown + words(COMMON, skipped))
    answers = sorted(words(skipped, skipped + COMMON))
    seed = rng.getrandbits(64)

    def puzzle(often: int, rarely: int) -> Puzzle:
        def context(units: int) -> str:
            """``units`` entries besides the common words'; the last word may come up short."""
            first = skipped + COMMON
            others = [
                word for word in words(first, first - (-units // rarely)) for _ in range(rarely)
            ]
            return _list(seed, often * answers + others[:units])

        return Puzzle(
            opening=(
                "The list below holds many words, some of them much more often than others."
                f" Find the {COMMON} words that stand in it most often.\n\n{example}\n\n"
                f"{_COMMON_QUESTION} {', '.join(sorted(shown))}\n\nThe next list:"
            ),
            context=context,
            smallest=COMMON * rarely,
            question=_COMMON_QUESTION,
            answers=tuple(answers),
        )

    puzzles = [puzzle(*counts) for counts in _COUNTS]
    for fitting in puzzles:
        tokens = len(setting.tokenizer.encode_prompt(fitting.prompt(fitting.smallest)))
        if 2 * tokens <= setting.length:
            return fitting
    return puzzles[-1]


def _list(seed: int, entries: list[str]) -> str:
    """``1. word 2. word ...`` in an order that the seed decides."""
    shuffled = random.Random(seed).sample(entries, len(entries))
    return " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, 1))


def _word(number: int, parts: int) -> str:
    """Return a noun behind adjectives, joined by hyphens."""
    number, noun = divmod(number, len(NOUNS))
    words = [NOUNS[noun]]
    for _ in range(parts - 1):
        number, adjective = divmod(number, len(ADJECTIVES))
        words.insert(0, ADJECTIVES[adjective])
    return "-".join(words)


def frequent_words(rng: random.Random, setting: Setting) -> Puzzle:
    """Coded words in random order, ``n / (zeta(2) * rank**2)`` times each."""
    del setting
    draws = DistinctDraws(rng, len(string.ascii_lowercase) ** _LETTERS)
    seed = rng.getrandbits(64)

    def context(units: int) -> str:
        counts = coded_counts(units)
        ranked = [_NOISE, *(_coded(number) for number in draws.between(0, len(counts) - 1))]
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(text)
        return " ".join(text)

    return Puzzle(
        opening=(
            "The text below consists of coded words. Watch how often each of them appears;"
            f" the dots '{_NOISE}' do not count."
        ),
        context=context,
        smallest=_FEWEST_CODED,
        question=(
            f"Question: Which {FREQUENT} coded words appear most often in the text above, the most"
            " frequent first?\n"
            f"Answer: The {FREQUENT} coded words that appear most often in the text above are"
        ),
        answers=tuple(_coded(number) for number in draws.between(0, FREQUENT)),
    )


def coded_counts(units: int) -> list[int]:
    """How often each rank appears; the ranks that never do are left out."""
    counts: list[int] = []
    while (count := int(units / (_ZETA_2 * (len(counts) + 1) ** 2))) > 0:
        counts.append(count)
    return counts


def _coded(number: int) -> str:
    letters = []
    for _ in range(_LETTERS):
        number, letter = divmod(number, len(string.ascii_lowercase))
        letters.append(string.ascii_lowercase[letter])
    return "".join(letters)
