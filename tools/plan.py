"""Plans a run without starting it: what a configuration amounts to, and what it costs.

python tools/plan.py model +model=qwen3_4b parallel.tp=2 parallel.cp=4 [--ranks 16]
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_ttt.config.derived import model_parallel_size
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.load import check, describe, load_config


def plan_model(arguments: argparse.Namespace) -> int:
    """Prints the resolved configuration, parameter counts, states, spans and batches."""
    config = load_config([*arguments.overrides, "run.dry_run=true"])
    ranks = arguments.ranks or model_parallel_size(config.parallel)
    check(config, world_size=ranks)
    print(describe(config, world_size=ranks))
    return 0


def add_model_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """``plan.py model``: the dry run for any number of ranks, on any machine."""
    parser = commands.add_parser("model", help="what a configuration would build")
    parser.add_argument("overrides", nargs="*", help="as for launch/pretrain.py: +model=NAME ...")
    parser.add_argument("--ranks", type=int, help="processes (default: one copy of the model)")
    parser.set_defaults(run=plan_model)


def main(argv: Sequence[str]) -> int:
    """Runs the chosen command; 2 for a mistake of the user, one line per fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_model_command(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
