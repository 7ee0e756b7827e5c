"""Variable tracking: one variable has a value, others take it over, link by link (RULER, 3.2)."""

from __future__ import annotations

import random
import string

from megatron_ttt.evaluation.ruler.puzzle import Puzzle, Setting

HOPS = 4
_NAME_LETTERS = 5
_EXAMPLE = (("QRSTU", "VWXYZ", "KLMNO"), "10203")


def variable_tracking(rng: random.Random, setting: Setting) -> Puzzle:
    """Return a chain of ``HOPS`` assignments after the first, behind a worked example."""
    names = _names(rng, HOPS + 1)
    value = str(rng.randrange(10_000, 100_000))
    depths = sorted(rng.random() for _ in names)
    needles = list(zip(depths, _assignments(names, value), strict=True))
    first = setting.haystack.start(rng)
    shown, number = _EXAMPLE
    example = f"{' '.join(_assignments(shown, number))}\n\n{_question(number)} {', '.join(shown)}"
    return Puzzle(
        opening=(
            "Variables are assigned in the text below. Follow which of them have the same value."
            f"\n\n{example}\n\nThe next text:"
        ),
        context=lambda units: setting.haystack.hiding(needles, first=first, words=units),
        smallest=0,
        question=_question(value),
        answers=names,
    )


def _assignments(names: tuple[str, ...], value: str) -> list[str]:
    links = zip(names[1:], names[:-1], strict=True)
    return [f"VAR {names[0]} = {value}.", *(f"VAR {new} = VAR {old}." for new, old in links)]


def _question(value: str) -> str:
    return (
        f"Question: Which variables have the value {value} in the text above?\n"
        f"Answer: In the text above, the variables that have the value {value} are"
    )


def _names(rng: random.Random, count: int) -> tuple[str, ...]:
    """Different ones, none of the example's."""
    found: list[str] = []
    while len(found) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=_NAME_LETTERS))
        if name not in found and name not in _EXAMPLE[0]:
            found.append(name)
    return tuple(found)
