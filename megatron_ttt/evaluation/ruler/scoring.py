"""How much of the true answer an output holds (RULER's string match)."""

from collections.abc import Sequence

from megatron_ttt.evaluation.ruler.puzzle import Match


def string_match(output: str, answers: Sequence[str], match: Match) -> float:
    """Share of the references that occur in the output, upper and lower case alike; 0 to 1.

    Args:
        output: what the model wrote.
        answers: references.
        match: ``ANY``: 1 as soon as one of them occurs.
    """
    text = output.lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if match is Match.ANY else sum(found) / len(found)
