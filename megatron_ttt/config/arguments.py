"""What the programs with ``--options`` share: mistakes take one line, whoever finds them."""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from megatron_ttt.config.bounds import INT32, SEED, Bound
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.launcher import LaunchError, launched

MISTAKE = 2  # exit status of a user's mistake


class OneLineParser(argparse.ArgumentParser):
    """A mistake in the arguments takes one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())  # values may hold line breaks
        print(f"error: {line} (--help lists the options)", file=sys.stderr)
        sys.exit(MISTAKE)


def bounded(bound: Bound, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """A ``type`` of argparse: a number inside a bound.

    Args:
        bound: what is valid.
        kind: int or float.
    """

    def read(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):  # of any text, as Python reads numbers
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be {expected}") from None
        complaint = bound.complaint(value)
        if complaint is not None:
            raise argparse.ArgumentTypeError(f"{text[:40]}: {complaint}")
        return value

    return read


# numbers whose lower ends are checked beside what they are for
WHOLE = bounded(Bound(-INT32))
SEED_NUMBER = bounded(SEED)


def tell(error: ValueError | OSError, *, mark_faults: str = "") -> int:
    """Print a user's mistake to stderr, a line each, on the first rank; the exit status.

    What is wrong with a process's own place among the others every process prints.

    Args:
        error: the mistake.
        mark_faults: before each line of a :class:`ConfigError`; other mistakes begin with
            ``error:``.
    """
    try:
        speaks = launched().is_first or isinstance(error, LaunchError)
    except LaunchError:
        speaks = True
    if speaks:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        mark = "error: "
        if isinstance(error, ConfigError):
            mark = mark_faults
        else:
            del lines[1:]
        print("\n".join(mark + line for line in lines), file=sys.stderr)
    return MISTAKE


@dataclass(frozen=True)
class FlagCondition:
    """When a flag has an effect.

    Attributes:
        acts: of the parsed arguments.
        otherwise: under what it has none, behind "has no effect".
    """

    acts: Callable[[argparse.Namespace], bool]
    otherwise: str


def flag_notices(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    conditions: Mapping[str, FlagCondition],
) -> list[str]:
    """One line for each flag that differs from its default and has no effect.

    Args:
        parser: that parsed them; it knows the defaults.
        options: the arguments.
        conditions: by the flags as they are typed; a flag without one always acts.
    """
    notices = []
    for flag, condition in conditions.items():
        name = flag.removeprefix("--").replace("-", "_")
        given = getattr(options, name) != parser.get_default(name)
        if given and not condition.acts(options):
            notices.append(f"notice: {flag} has no effect {condition.otherwise}")
    return notices
