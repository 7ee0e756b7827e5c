"""Question answering over given facts: documents about invented people (RULER, section 3.4).

The paper hides the paragraph that answers a question of a public data set among the paragraphs of
other questions. Here the facts are made up, so that nothing is downloaded and no model knows them.
"""

from __future__ import annotations

import random

from megatron_ttt.evaluation.ruler.haystack import DistinctDraws
from megatron_ttt.evaluation.ruler.puzzle import Match, Puzzle, Setting
from megatron_ttt.evaluation.ruler.vocabulary import FIRST_NAMES, SYLLABLES, TRADES

_FACTS = 4  # of a document


def question_answering(rng: random.Random, setting: Setting) -> Puzzle:
    """Where somebody was born, or, every second time, where somebody's teacher was born.

    People and towns have different names, so one document answers the question, or two do.
    """
    del setting
    names = DistinctDraws(rng, len(SYLLABLES) ** 3)
    details = rng.getrandbits(64)
    asked, teacher = (_Person(names, number) for number in range(2))
    hops = rng.choice((1, 2))
    seed = rng.getrandbits(64)
    if hops == 1:
        question, answer = f"Where was {asked.name} born?", asked.town
        begun = f"{asked.name} was born in"
    else:
        question, answer = f"Where was the teacher of {asked.name} born?", teacher.town
        begun = f"The teacher of {asked.name} was born in"

    def context(units: int) -> str:
        """``units`` facts; the documents that matter are complete."""
        people = [_Person(names, number) for number in range(-(-units // _FACTS))]
        documents = []
        for number, person in enumerate(people):
            taught_by = people[number ^ 1] if number ^ 1 < len(people) else asked
            facts = person.facts(random.Random(details + number), taught_by.name)
            documents.append(" ".join(facts[: units - number * _FACTS]))
        random.Random(seed).shuffle(documents)
        return "\n".join(f"Document {i}: {text}" for i, text in enumerate(documents, 1))

    return Puzzle(
        opening="Answer the question with what the documents below say, and nothing else.",
        context=context,
        smallest=2 * _FACTS,
        question=f"Question: {question}\nAnswer: According to the documents, {begun}",
        answers=(answer,),
        match=Match.ANY,
    )


class _Person:
    """A name and a town that nobody else has."""

    def __init__(self, names: DistinctDraws, number: int) -> None:
        surname, town = names[2 * number], names[2 * number + 1]
        self.name = f"{FIRST_NAMES[surname % len(FIRST_NAMES)]} {_invented(surname)}"
        self.town = _invented(town)

    def facts(self, rng: random.Random, teacher: str) -> list[str]:
        return [
            f"{self.name} was born in {self.town}.",
            f"The teacher of {self.name} was {teacher}.",
            f"Later {self.name} became a {rng.choice(TRADES)}.",
            f"A child of {self.name} became a {rng.choice(TRADES)}.",
        ]


def _invented(number: int) -> str:
    syllables = []
    for _ in range(3):
        number, syllable = divmod(number, len(SYLLABLES))
        syllables.append(SYLLABLES[syllable])
    return "".join(syllables).capitalize()
