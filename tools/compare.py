#!/usr/bin/env python3
"""Compares runs over seeds and settings by what task=perplexity of tools/evaluate.py wrote.

python tools/compare.py outputs/evidence/micro/*/evaluation/perplexity.json \
    --output outputs/evidence/micro
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from megatron_ttt.config.arguments import OneLineParser, tell
from megatron_ttt.evaluation.comparison import compare, read_result
from megatron_ttt.evaluation.report import print_report, write_report


def parser() -> OneLineParser:
    made = OneLineParser(description="Runs against each other, over seeds and settings.")
    made.add_argument("results", nargs="+", type=Path, metavar="FILE", help="perplexity.json files")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="for comparison.json and .png")
    return made


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 2 for a mistake, which takes one line."""
    options = parser().parse_args(arguments)
    console = Console()
    try:
        report = compare([read_result(path) for path in options.results])
        print_report(report, console)
        if options.output is not None:
            for file in write_report(report, options.output, name="comparison", about={}):
                console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
