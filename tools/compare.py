#!/usr/bin/env python3
"""Compare runs over seeds and settings by what task=perplexity of tools/evaluate.py wrote.

python tools/compare.py outputs/evidence/micro/*/evaluation/perplexity.json \\
    output=outputs/evidence/micro
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING
from rich.console import Console

from megatron_ttt.config.command import Command, run_command, tell
from megatron_ttt.evaluation.comparison import compare, read_result
from megatron_ttt.evaluation.report import print_report, write_report


@dataclass
class Keys:
    """Compare results of runs: words without KEY= are their files."""

    results: list[Path] = MISSING  # files perplexity.json
    output: Path | None = None  # folder for comparison.json and comparison.png


def run(keys: Keys) -> int:
    """Print the comparison, and write it where ``output`` is given."""
    console = Console()
    report = compare([read_result(path) for path in keys.results])
    print_report(report, console)
    if keys.output is not None:
        for file in write_report(report, keys.output, name="comparison", about={}):
            console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    return 0


COMMAND = Command(Keys, run, files="results")


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, or 2 for a mistake, which takes one line."""
    try:
        return run_command(arguments, COMMAND, __doc__)
    except OSError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
