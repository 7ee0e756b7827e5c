#!/usr/bin/env python3
"""Measures what the project claims about speed and memory.

python tools/benchmark.py fast-weight-layer --chunk 64 --part mlp
python tools/benchmark.py fast-weight-layer --hidden 2560 --ffn 9728 --tokens 65536 --dtype bf16 \
    --device cuda --json layer.json
python tools/benchmark.py scan --ranks 8 --write-constants constants.json
torchrun --nnodes 4 --nproc-per-node 8 ... tools/benchmark.py scan --state-mb 200
python tools/benchmark.py decoding --batch 1 4
python tools/benchmark.py checkpoint --hidden 1024 --layers 12 --folder /scratch
python tools/benchmark.py counted-step data.reset_attention=false
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from megatron_ttt.config.arguments import WHOLE, OneLineParser, bounded, tell
from megatron_ttt.config.bounds import COUNT, Bound


def add_fast_weight_layer(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """A fast-weight layer against the materialising formulation and a dense one."""
    parser = commands.add_parser(
        "fast-weight-layer", help="forward and backward of one layer, time and memory"
    )
    add = parser.add_argument
    add("--hidden", type=WHOLE, default=512)
    add("--ffn", type=WHOLE, default=1536)
    add("--tokens", type=WHOLE, default=8192)
    add("--chunk", type=WHOLE, default=256, help="tokens of a chunk (default: 256)")
    add("--part", default="projection", help="projection (default), or mlp: the whole layer")
    add("--dtype", default="fp32", help="fp32 (default), bf16 or fp64")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--repeats", type=WHOLE, default=5, help="measured rounds (default: 5)")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.set_defaults(run=run_fast_weight_layer)


def run_fast_weight_layer(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if the variants disagree."""
    # torch takes seconds to import: --help and mistakes in the arguments do without it
    from megatron_ttt.benchmarks import fast_weight_layer as benchmark

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "json")}
    problem = benchmark.LayerProblem(**options)
    if arguments.json and not arguments.json.parent.is_dir():
        raise ValueError(f"there is no folder {arguments.json.parent} for {arguments.json.name}")
    try:
        measurements, difference = benchmark.measure(problem)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    benchmark.report(problem, measurements, difference, Console())
    if arguments.json:
        record = benchmark.as_record(problem, measurements, difference)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def add_checkpoint(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """What saving costs the step, asynchronously and synchronously."""
    parser = commands.add_parser("checkpoint", help="how long a step waits for a checkpoint")
    add = parser.add_argument
    add("--hidden", type=WHOLE, default=512)
    add("--layers", type=WHOLE, default=8)
    add("--repeats", type=WHOLE, default=3, help="saves in each mode (default: 3)")
    add("--folder", type=Path, help="on the file system to measure (default: a temporary one)")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.set_defaults(run=run_checkpoint)


def run_checkpoint(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if a checkpoint cannot be saved."""
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    from megatron_ttt.benchmarks import checkpoint as benchmark
    from megatron_ttt.training.checkpoint_saver import SaveFailed

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "json")}
    problem = benchmark.SaveProblem(**options)
    try:
        report = benchmark.measure(problem)
    except SaveFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    benchmark.show(problem, report, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(benchmark.as_record(problem, report), indent=2) + "\n")
    return 0


def add_conversion(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """A synthetic checkpoint of real shapes to Megatron and back."""
    parser = commands.add_parser(
        "conversion", help="a random checkpoint of real shapes, both ways, time and peak memory"
    )
    add = parser.add_argument
    add("--model", default="qwen3_4b", help="of configs/model (default: qwen3_4b)")
    add(
        "--folder",
        type=Path,
        default=Path("outputs/benchmark_conversion"),
        help="for three times the checkpoint's size; must not exist, is removed afterwards",
    )
    add("--verify", action="store_true", help="also an import with --verify")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.set_defaults(run=run_conversion)


def run_conversion(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if a conversion fails."""
    from megatron_ttt.benchmarks import conversion as benchmark
    from megatron_ttt.config.load import load_config

    model = load_config([f"+model={arguments.model}", "run.dry_run=true"]).model
    if arguments.folder.exists():
        raise ValueError(f"{arguments.folder} exists")
    program = [sys.executable, str(Path(__file__).with_name("convert_checkpoint.py"))]
    try:
        size, rows = benchmark.measure(model, program, arguments.folder, verify=arguments.verify)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    benchmark.report(model, size, rows, Console())
    if arguments.json:
        record = benchmark.as_record(model, size, rows)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def add_decoding(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """A generated token with fast weights against the same model without."""
    parser = commands.add_parser("decoding", help="what a generated token costs, on and off")
    add = parser.add_argument
    add("--hidden", type=bounded(COUNT), default=512)
    add("--ffn", type=bounded(COUNT), default=1536)
    add("--layers", type=bounded(COUNT), default=12)
    add(
        "--chunk",
        type=bounded(COUNT),
        default=128,
        help="tokens of a chunk and of a round (default: 128)",
    )
    add("--batch", type=bounded(COUNT), nargs="+", default=[1, 4], help="rows (default: 1 4)")
    add("--rounds", type=bounded(COUNT), default=5, help="measured rounds (default: 5)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.set_defaults(run=run_decoding)


def run_decoding(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    from megatron_ttt.benchmarks import decoding as benchmark

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "json", "batch")}
    problem = benchmark.DecodingProblem(**options, batches=tuple(arguments.batch))
    times = benchmark.measure(problem)
    benchmark.report(problem, times, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(benchmark.as_record(problem, times), indent=2) + "\n")
    return 0


def add_scan(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """The scan across ranks: its links, its four algorithms, what overlap hides."""
    parser = commands.add_parser(
        "scan", help="the scan's links and algorithms beside the cost model's prediction"
    )
    add = parser.add_argument
    add(
        "--ranks",
        type=WHOLE,
        default=4,
        help="local processes; under torchrun its own (default: 4)",
    )
    add(
        "--state-mb",
        type=bounded(Bound(-1, 1e6), float),
        default=25.0,
        help="one rank's state (default: 25 MB)",
    )
    add("--order", choices=["zigzag", "contiguous"], default="zigzag")
    add("--repeats", type=WHOLE, default=9, help="measured rounds (default: 9)")
    add("--write-constants", type=Path, metavar="FILE", help="for parallel.scan_constants")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.set_defaults(run=run_scan)


def run_scan(arguments: argparse.Namespace) -> int:
    """Measures on the ranks of torchrun, or on local ones; rank 0 prints."""
    from megatron_ttt.benchmarks import scan_ranks

    options = {k: v for k, v in vars(arguments).items() if k != "run"}
    return scan_ranks.run(scan_ranks.ScanArguments(**options))


def add_counted_step(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Forward and backward of a real model on meta tensors: what a GPU would be asked for."""
    parser = commands.add_parser(
        "counted-step",
        help="kernels, bytes, FLOPs, waits and memory kept by one micro-batch, without a GPU",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    add("--model", default="qwen3_4b", help="of configs/model (default: qwen3_4b)")
    add("--documents", type=int, default=1, help="in each row, equally long (default: 1)")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.set_defaults(run=run_counted_step)


def run_counted_step(arguments: argparse.Namespace) -> int:
    """Counts and prints."""
    from megatron_ttt.benchmarks import counted_step as benchmark
    from megatron_ttt.config.load import load_config

    words = [f"+model={arguments.model}", "run.dry_run=true", "train.precision=bf16"]
    words += arguments.overrides
    config = load_config(words)
    if not 1 <= arguments.documents <= config.train.seq_length:
        raise ValueError(
            f"--documents {arguments.documents}: a row has {config.train.seq_length} tokens"
        )
    counted = benchmark.measure(config, documents=arguments.documents)
    benchmark.report(counted, Console(width=140))
    if arguments.json:
        record = benchmark.as_record(counted, words, arguments.documents)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def main(argv: list[str]) -> int:
    """Runs the chosen benchmark; 2 for a mistake of the user, in one line."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    add_fast_weight_layer(commands)
    add_checkpoint(commands)
    add_conversion(commands)
    add_scan(commands)
    add_decoding(commands)
    add_counted_step(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ValueError as error:
        return tell(error)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
