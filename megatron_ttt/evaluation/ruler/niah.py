"""Needles in a haystack: access codes of named things, hidden in a text (RULER, section 3.1).

``single``: one code. ``multikey``: the codes of other things lie there too. ``multivalue``: one
thing has several codes. ``multiquery``: the codes of several things are asked for.
"""

from __future__ import annotations

import random

from megatron_ttt.evaluation.ruler.puzzle import Build, Puzzle, Setting
from megatron_ttt.evaluation.ruler.vocabulary import ADJECTIVES, NOUNS

_DIGITS = 7
_OPENING = (
    "Access codes are hidden in the text below. Remember all of them; you will be asked for some."
)


def niah(*, keys: int, values: int, queries: int) -> Build:
    """Return a builder of needle puzzles.

    Args:
        keys: things that have a code in the text.
        values: codes of each.
        queries: how many of the things are asked for.
    """
    assert 1 <= queries <= keys

    def build(rng: random.Random, setting: Setting) -> Puzzle:
        names = _names(rng, keys)
        codes = _codes(rng, keys * values)
        hidden = [(names[place // values], code) for place, code in enumerate(codes)]
        rng.shuffle(hidden)
        needles = [f"An access code of {name} is {code}." for name, code in hidden]
        depths = sorted(rng.random() for _ in needles)
        if setting.depth is not None:
            assert len(needles) == 1, "one depth is for one needle"
            depths = [setting.depth]
        first = setting.haystack.start(rng)
        asked = names[:queries]
        return Puzzle(
            opening=_OPENING,
            context=lambda units: setting.haystack.hiding(
                list(zip(depths, needles, strict=True)), first=first, words=units
            ),
            smallest=0,
            question=_question(asked, several=values * queries > 1),
            answers=tuple(code for name in asked for owner, code in hidden if owner == name),
        )

    return build


def _question(names: list[str], *, several: bool) -> str:
    asked = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    are, codes = ("are", "access codes") if several else ("is", "access code")
    return (
        f"Question: What {are} the {codes} of {asked} in the text above?\n"
        f"Answer: In the text above, the {codes} of {asked} {are}"
    )


def _names(rng: random.Random, count: int) -> list[str]:
    """Different in both parts, so that no key is nearly another."""
    adjectives, nouns = rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count)
    return [f"{one} {other}" for one, other in zip(adjectives, nouns, strict=True)]


def _codes(rng: random.Random, count: int) -> list[str]:
    low = 10 ** (_DIGITS - 1)
    return [str(low + number) for number in rng.sample(range(9 * low), count)]
