"""What the programs with ``--options`` share: mistakes take one line, whoever finds them."""

import argparse
import sys
from typing import NoReturn

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.launcher import LaunchError, launched

MISTAKE = 2  # exit status of a user's mistake


class OneLineParser(argparse.ArgumentParser):
    """A mistake in the arguments takes one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())  # values may hold line breaks
        print(f"error: {line} (--help lists the options)", file=sys.stderr)
        sys.exit(MISTAKE)


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
