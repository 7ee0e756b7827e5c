#!/usr/bin/env python3
"""Converts checkpoints between Hugging Face and Megatron, one tensor at a time, without a GPU.

python tools/convert_checkpoint.py import Qwen3-4B-Base checkpoints/qwen3_4b --verify
python tools/convert_checkpoint.py export outputs/qwen3_4b/checkpoints/step_00005000 exported
python tools/convert_checkpoint.py diff exported Qwen3-4B-Base
"""

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Nothing here computes anything worth a GPU, and a busy one must not get in the way.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from rich.console import Console
from rich.table import Table

from megatron_ttt.config.arguments import (
    SEED_NUMBER,
    FlagCondition,
    OneLineParser,
    bounded,
    flag_notices,
    tell,
)
from megatron_ttt.config.bounds import Bound
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.launcher import one_process

if TYPE_CHECKING:
    from megatron_ttt.config.schema import ModelConfig, TTTConfig
    from megatron_ttt.conversion.importing import Report

_WRITES = FlagCondition(lambda given: not given.dry_run, "with --dry-run")
IMPORT_FLAGS = {"--verify": _WRITES}
EXPORT_FLAGS = {"--verify": _WRITES, "--shard-gib": _WRITES, "--tokenizer": _WRITES}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_import(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Hugging Face to Megatron."""
    parser = commands.add_parser("import", help="Hugging Face folder -> Megatron checkpoint")
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder with config.json and safetensors")
    add("destination", type=Path, metavar="DST", help="folder for checkpoint.load=DST")
    add("--model", metavar="NAME", help="a model of configs/model that must be the checkpoint's")
    add(
        "--ttt-layers",
        metavar="0,6,...",
        help="layers that get a target generator, or none (default: those of the source, or every"
        " sixth)",
    )
    add(
        "--ttt-chunk",
        type=bounded(Bound(1)),
        metavar="TOKENS",
        help="ttt.chunk_size, instead of the source's",
    )
    add(
        "--ttt-eta",
        type=bounded(Bound(0), float),
        metavar="ETA",
        help="ttt.eta, instead of the source's",
    )
    add(
        "--seed",
        type=SEED_NUMBER,
        default=1234,
        help="of a new target generator (default: train.seed's)",
    )
    _add_common(parser)
    parser.set_defaults(
        run=run_import, notices=partial(flag_notices, parser, conditions=IMPORT_FLAGS)
    )


def add_export(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Megatron to Hugging Face."""
    parser = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face folder")
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="checkpoint of an import or of a training run")
    add("destination", type=Path, metavar="DST", help="folder for transformers")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with tokenizer and generation files (default: where the checkpoint began)",
    )
    add("--dtype", choices=DTYPES, help="of the exported tensors (default: as stored)")
    add(
        "--style",
        choices=["package", "reference"],
        default="package",
        help="package: the classes of megatron_ttt.hf; reference: the plain architecture with"
        " ttt_* keys, for the published reference implementation",
    )
    add(
        "--shard-gib",
        type=bounded(Bound(0, 1e6, open=True), float),
        default=4.0,
        help="largest file of weights (default: 4)",
    )
    _add_common(parser)
    parser.set_defaults(
        run=run_export, notices=partial(flag_notices, parser, conditions=EXPORT_FLAGS)
    )


def add_diff(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Two checkpoints of either kind."""
    parser = commands.add_parser("diff", help="compare two checkpoints of either kind")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.set_defaults(run=run_diff, notices=lambda given: [])


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run both models on the same tokens, layer by layer, before DST becomes visible",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the mapping, write nothing")


def run_import(arguments: argparse.Namespace) -> int:
    """Import, or print what an import would do."""
    from megatron_ttt.conversion.hf_config import check_agreement
    from megatron_ttt.conversion.hf_folder import HFFolder
    from megatron_ttt.conversion.importing import import_checkpoint
    from megatron_ttt.conversion.source import MegatronView, described_ttt

    source = HFFolder(arguments.source)
    target, wanted = described_ttt(
        source,
        layers=_layers(arguments.ttt_layers),
        chunk_size=arguments.ttt_chunk,
        eta=arguments.ttt_eta,
    )
    name = arguments.model or arguments.source.resolve().name
    view = MegatronView(source, target=target, seed=arguments.seed, name=name)
    if arguments.model is not None:
        check_agreement(_configured_model(arguments.model), view.model, str(arguments.source))
    if arguments.dry_run:
        rows = [
            (t.megatron, t.shape, _origin(t.sources, t.megatron in view.drawn))
            for t in view.mapping.tensors
        ]
        _print_mapping("Megatron", "Hugging Face", rows)
        return 0
    check = None
    if arguments.verify:
        check = _verifier(lambda written: (source, written), view.model, wanted)
    with _progress(sum(t.bytes(view.dtype(t)) for t in view.mapping.tensors)) as report:
        import_checkpoint(
            view, arguments.destination, ttt=wanted, report=report, before_publish=check
        )
    print(f"checkpoint.load={arguments.destination}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Export, or print what an export would do."""
    import torch

    from megatron_ttt.conversion.exporting import HFView, Style, export_checkpoint
    from megatron_ttt.conversion.manifest import described_model, origin
    from megatron_ttt.conversion.megatron_folder import MegatronFolder

    source = MegatronFolder(arguments.source)
    model, ttt = described_model(source)
    dtype = getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None
    view = HFView(source, model, ttt, dtype=dtype)
    if arguments.dry_run:
        rows = [
            (piece.name, piece.shape, _origin(tuple(key for key, _ in piece.runs), False))
            for piece in view.pieces
        ]
        _print_mapping("Hugging Face", "Megatron", rows)
        return 0
    if arguments.tokenizer is not None and not arguments.tokenizer.is_dir():
        raise ConfigError([Fault("--tokenizer", arguments.tokenizer, "is no folder")])
    style = Style(arguments.style)
    steps: list[Callable[[Path], None]] = []
    if view.fast and style is Style.package:
        steps.append(_auto_map(view.model))
    if arguments.verify:
        steps.append(_verifier(lambda written: (written, source), model, ttt))

    def finish(folder: Path) -> None:
        for step in steps:
            step(folder)

    companions_from = arguments.tokenizer or origin(source)
    if companions_from is None:
        message = "no tokenizer or generation files: where the model began is not known, or gone"
        print(f"warning: {message}; --tokenizer DIR adds them", file=sys.stderr)
    with _progress(sum(piece.bytes for piece in view.pieces)) as report:
        export_checkpoint(
            view,
            arguments.destination,
            companions_from=companions_from,
            style=style,
            report=report,
            shard_bytes=int(arguments.shard_gib * 2**30),
            before_publish=finish,
        )
    print(f"exported to {arguments.destination}")
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what differs; 1 if anything does."""
    from megatron_ttt.conversion.difference import differences

    count = 0
    for difference in differences(arguments.first, arguments.second):
        count += 1
        largest = "" if difference.largest is None else f"  max |a-b| = {difference.largest:.3e}"
        print(f"{difference.name}: {difference.what}{largest}")
    print("equal" if count == 0 else f"{count} tensors differ")
    return 0 if count == 0 else 1


def _layers(text: str | None) -> list[int] | None:
    """``--ttt-layers``: ``None`` if not given, empty for none."""
    if text is None:
        return None
    if text in ("none", ""):
        return []
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError:
        message = "must be numbers such as 0,6,12, or none"
        raise ConfigError([Fault("--ttt-layers", text, message)]) from None


def _configured_model(name: str) -> "ModelConfig":
    from megatron_ttt.config.load import load_config

    return load_config([f"+model={name}", "run.dry_run=true"]).model


def _auto_map(model: "ModelConfig") -> Callable[[Path], None]:
    """Adds the files by which an export runs where this package is not installed."""
    if importlib.util.find_spec("transformers") is None:
        message = "fast weights need transformers: pip install 'megatron_ttt[hf]'"
        raise ConfigError([Fault("--style", "package", message)])
    from megatron_ttt.conversion.hf_config import TTT_SUFFIX
    from megatron_ttt.hf.auto_map import CLASSES, write_auto_map

    if model.family.name + TTT_SUFFIX not in CLASSES:
        message = f"there are no classes with fast weights for {model.family.name}; use reference"
        raise ConfigError([Fault("--style", "package", message)])
    return write_auto_map


def _verifier(
    sides: Callable[[Any], tuple[Any, Any]], model: "ModelConfig", ttt: "TTTConfig"
) -> Callable[[Path], None]:
    """Compares a finished folder, not visible yet, with the source.

    ``sides`` takes the opened folder and returns (Hugging Face side, Megatron side).
    """
    if importlib.util.find_spec("transformers") is None:
        message = "needs transformers: pip install 'megatron_ttt[hf]'"
        raise ConfigError([Fault("--verify", "on", message)])

    def check(path: Path) -> None:
        from megatron_ttt.training.quiet import quiet_libraries

        quiet_libraries()
        import megatron_ttt.hf  # noqa: F401 (registers the classes with fast weights)
        from megatron_ttt.config.schema import Config
        from megatron_ttt.conversion.hf_folder import HFFolder
        from megatron_ttt.conversion.megatron_folder import MegatronFolder
        from megatron_ttt.conversion.verification import compare_models, verify
        from megatron_ttt.training.distributed import distributed

        written = (MegatronFolder if (path / "metadata.json").exists() else HFFolder)(path)
        hf, megatron = sides(written)
        with distributed(Config()) as ranks:
            verify(
                compare_models(hf, megatron, model, ttt, ranks.groups),
                lambda stage: print(f"{stage.stage:<12} {stage.error:.1e}", flush=True),
            )

    return check


def _origin(sources: tuple[str, ...], drawn: bool) -> str:
    if drawn:
        return "initialised from the seed"
    return " + ".join(dict.fromkeys(sources)) or "constant"


def _print_mapping(left: str, right: str, rows: list[tuple[str, tuple[int, ...], str]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False)
    for header in (left, "shape", right):
        table.add_column(header, no_wrap=True)
    for name, shape, other in rows:
        table.add_row(name, "x".join(map(str, shape)), other)
    console.print(table)


@contextmanager
def _progress(total: int) -> Iterator["Report"]:
    """A bar in bytes on the terminal; silent elsewhere."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def report(name: str, size: int) -> None:
            progress.update(task, advance=size, description=name[-48:])

        yield report


def main(argv: list[str]) -> int:
    """Runs the chosen command; 2 for a mistake of the user, 1 if models differ."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_import, add_export, add_diff):
        add(commands)
    arguments = parser.parse_args(argv)
    warnings.showwarning = lambda message, *rest, **more: print(
        f"warning: {message}", file=sys.stderr
    )
    # torch takes seconds to import: --help and mistakes in the arguments do without it
    from megatron_ttt.conversion.failures import VerificationFailed

    try:
        one_process("checkpoints are converted")
        for line in arguments.notices(arguments):
            print(line, file=sys.stderr)
        status: int = arguments.run(arguments)
    except ConfigError as error:
        return tell(error)
    except VerificationFailed as error:
        print(f"verification failed: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
