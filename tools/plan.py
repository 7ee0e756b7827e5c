"""Plans a run without starting it: what a configuration amounts to, and what it costs.

python tools/plan.py model +model=qwen3_4b parallel.tp=2 parallel.cp=4 [--ranks 16]
python tools/plan.py scan +model=qwen3_8b parallel.cp=8 train.seq_length=32768 --plot scan.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ttt.config.arguments import OneLineParser, bounded, tell
from megatron_ttt.config.bounds import COUNT, Bound
from megatron_ttt.config.derived import model_parallel_size
from megatron_ttt.config.load import PRETRAINING, check, describe, load_config, tell_idle_keys


def plan_model(arguments: argparse.Namespace) -> int:
    """Prints the resolved configuration, parameter counts, states, spans and batches."""
    config = load_config([*arguments.overrides, "run.dry_run=true"])
    ranks = arguments.ranks or model_parallel_size(config.parallel)
    check(config, world_size=ranks)
    tell_idle_keys(PRETRAINING, config, arguments.overrides)
    print(describe(config, world_size=ranks))
    return 0


def add_model_command(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """``plan.py model``: the dry run for any number of ranks, on any machine."""
    parser = commands.add_parser("model", help="what a configuration would build")
    parser.add_argument("overrides", nargs="*", help="as for launch/pretrain.py: +model=NAME ...")
    parser.add_argument(
        "--ranks", type=bounded(COUNT), help="processes (default: one copy of the model)"
    )
    parser.set_defaults(run=plan_model)


def plan_scan(arguments: argparse.Namespace) -> int:
    """Prints what the scan costs on 2 to 4096 context-parallel ranks of a described cluster."""
    # torch takes seconds to import: the other command does without it
    from rich.console import Console

    from megatron_ttt.benchmarks import scan_plan
    from megatron_ttt.parallel.cost import GPU_CLUSTER, load_topology

    config = load_config([*arguments.overrides, "run.dry_run=true"])
    check(config, world_size=model_parallel_size(config.parallel))
    tell_idle_keys(PRETRAINING, config, arguments.overrides)
    path = config.parallel.scan_constants
    topology = GPU_CLUSTER if path is None else load_topology(Path(path))
    flops = arguments.tflops * 1e12
    rows = scan_plan.plan_rows(config, topology, flops=flops)
    scan_plan.show(config, rows, flops=flops, console=Console(width=140))
    if arguments.plot is not None:
        order = config.parallel.cp_order.value
        scan_plan.plot(rows, arguments.plot, title=f"scan of {config.model.name}, {order}")
        print(f"plot: {arguments.plot}")
    return 0


def add_scan_command(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """``plan.py scan``: the cost model's table; constants from ``parallel.scan_constants``."""
    parser = commands.add_parser("scan", help="what the scan costs on 2 to 4096 ranks")
    parser.add_argument("overrides", nargs="*", help="as for launch/pretrain.py: +model=NAME ...")
    parser.add_argument(
        "--tflops",
        type=bounded(Bound(0, 1e9, open=True), float),
        default=400.0,
        help="achieved per device (default: 400)",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw it")
    parser.set_defaults(run=plan_scan)


def main(argv: Sequence[str]) -> int:
    """Runs the chosen command; 2 for a mistake of the user, one line per fault."""
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_model_command(commands)
    add_scan_command(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (OSError, ValueError) as error:
        return tell(error)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
