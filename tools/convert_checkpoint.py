#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face and Megatron, one tensor at a time, without a GPU.

python tools/convert_checkpoint.py import checkpoint=Qwen3-4B-Base output=checkpoints/qwen3_4b \\
    verify=true
python tools/convert_checkpoint.py export checkpoint=outputs/qwen3_4b output=exported
python tools/convert_checkpoint.py diff exported Qwen3-4B-Base
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Nothing here computes anything worth a GPU, and a busy one must not get in the way.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from megatron_ttt.config.bounds import COUNT, INT32, SEED, Bound
from megatron_ttt.config.command import Command, run_command
from megatron_ttt.config.effects import Condition
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.conversion.failures import VerificationFailed

if TYPE_CHECKING:
    from megatron_ttt.config.schema import ModelConfig, TTTConfig
    from megatron_ttt.conversion.importing import Report


class Style(Enum):
    package = "package"
    reference = "reference"


class Dtype(Enum):
    bf16 = "bfloat16"
    fp16 = "float16"
    fp32 = "float32"


@dataclass
class Rule:
    """The update rule of an import."""

    layers: list[int] | None = None  # null: the source's, or every sixth; []: none
    chunk_size: int | None = None  # instead of the source's
    eta: float | None = None  # instead of the source's


@dataclass
class Conversion:
    """Keys of both directions."""

    checkpoint: Path = MISSING  # what is converted; to export, also a run
    output: Path = MISSING  # folder; for checkpoint.load=, or for transformers
    verify: bool = False  # run both models, layer by layer, before output becomes visible
    dry_run: bool = False  # print the mapping, write nothing


@dataclass
class Import(Conversion):
    """Make a Megatron checkpoint of a Hugging Face folder."""

    model: str | None = None  # a model of configs/model that must be the checkpoint's
    seed: int = 1234  # of a new target generator; train.seed draws the same
    ttt: Rule = field(default_factory=Rule)


@dataclass
class Export(Conversion):
    """Make a Hugging Face folder of a Megatron checkpoint."""

    tokenizer: Path | None = None  # a folder; null: where the checkpoint began
    dtype: Dtype | None = None  # of the exported tensors; null: as stored
    style: Style = Style.package  # reference: for the published implementation
    shard_gib: float = 4.0  # largest file of weights


@dataclass
class Diff:
    """Compare two checkpoints of either kind: words without KEY= are their folders."""

    folders: list[Path] = MISSING  # the two


def run_import(keys: Import) -> int:
    """Import, or print what an import would do."""
    from megatron_ttt.conversion.hf_config import check_agreement
    from megatron_ttt.conversion.hf_folder import HFFolder
    from megatron_ttt.conversion.importing import import_checkpoint
    from megatron_ttt.conversion.opened import find_folder
    from megatron_ttt.conversion.source import MegatronView, described_ttt

    folder, _ = find_folder(keys.checkpoint)
    source, rule = HFFolder(folder), keys.ttt
    layers = None if rule.layers is None else sorted(set(rule.layers))
    target, wanted = described_ttt(source, layers=layers, chunk_size=rule.chunk_size, eta=rule.eta)
    name = keys.model or folder.resolve().name
    view = MegatronView(source, target=target, seed=keys.seed, name=name)
    if keys.model is not None:
        check_agreement(_configured_model(keys.model), view.model, str(folder))
    if keys.dry_run:
        rows = [
            (t.megatron, t.shape, _origin(t.sources, t.megatron in view.drawn))
            for t in view.mapping.tensors
        ]
        _print_mapping("Megatron", "Hugging Face", rows)
        return 0
    check = None
    if keys.verify:
        check = _verifier(lambda written: (source, written), view.model, wanted)
    with _progress(sum(t.bytes(view.dtype(t)) for t in view.mapping.tensors)) as report:
        import_checkpoint(view, keys.output, ttt=wanted, report=report, before_publish=check)
    print(f"checkpoint.load={keys.output}")
    place = keys.output if "/" in str(keys.output) else f"./{keys.output}"
    print(f"train it: python launch/pretrain.py +model={place} data.path=PREFIX")
    return 0


def run_export(keys: Export) -> int:
    """Export, or print what an export would do."""
    import torch

    from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
    from megatron_ttt.checkpoints.run_files import checkpoint_folder
    from megatron_ttt.conversion.exporting import HFView, export_checkpoint
    from megatron_ttt.conversion.exporting import Style as Written
    from megatron_ttt.conversion.manifest import described_model, origin

    source = MegatronFolder(checkpoint_folder(keys.checkpoint))
    model, ttt = described_model(source)
    dtype = getattr(torch, keys.dtype.value) if keys.dtype else None
    view = HFView(source, model, ttt, dtype=dtype)
    if keys.dry_run:
        rows = [
            (piece.name, piece.shape, _origin(tuple(key for key, _ in piece.runs), False))
            for piece in view.pieces
        ]
        _print_mapping("Hugging Face", "Megatron", rows)
        return 0
    written = view.config(None, Written(keys.style.value))["model_type"]
    if not written.startswith(model.family.name):
        message = f"notice: written as {written}, which is {model.family.name} with a window"
        print(message, file=sys.stderr)
    if keys.tokenizer is not None and not keys.tokenizer.is_dir():
        raise ConfigError([Fault("tokenizer", keys.tokenizer, "is not a folder")])
    steps: list[Callable[[Path], None]] = []
    if view.fast and keys.style is Style.package:
        steps.append(_auto_map(view.model))
    if keys.verify:
        steps.append(_verifier(lambda written: (written, source), model, ttt))

    def finish(folder: Path) -> None:
        for step in steps:
            step(folder)

    companions_from = keys.tokenizer or origin(source)
    if companions_from is None:
        message = "no tokenizer or generation files: where the model began is not known, or gone"
        print(f"warning: {message}; tokenizer=DIR adds them", file=sys.stderr)
    with _progress(sum(piece.bytes for piece in view.pieces)) as report:
        export_checkpoint(
            view,
            keys.output,
            companions_from=companions_from,
            style=Written(keys.style.value),
            report=report,
            shard_bytes=int(keys.shard_gib * 2**30),
            before_publish=finish,
        )
    print(f"exported to {keys.output}")
    return 0


def run_diff(keys: Diff) -> int:
    """Print what differs; 1 if anything does but what fast weights add to a plain model."""
    from megatron_ttt.conversion.difference import differences

    if len(keys.folders) != 2:
        raise ConfigError([Fault("folders", keys.folders, "must be two folders")])
    found = []
    for difference in differences(*keys.folders):
        found.append(difference)
        largest = "" if difference.largest is None else f"  max |a-b| = {difference.largest:.3e}"
        print(f"{difference.name}: {difference.what}{largest}")
    added = sum(difference.is_addition for difference in found)
    count = len(found) - added
    if added and not count:
        print(f"equal in all that both have; {added} tensors of fast weights on one side alone")
    else:
        print("equal" if count == 0 else f"{count} tensors differ")
    return 0 if count == 0 else 1


def _configured_model(name: str) -> "ModelConfig":
    from megatron_ttt.config.load import load_config

    return load_config([f"+model={name}", "run.dry_run=true"]).model


def _auto_map(model: "ModelConfig") -> Callable[[Path], None]:
    """Return what adds the files by which an export runs where this package is not installed."""
    if importlib.util.find_spec("transformers") is None:
        message = "fast weights need transformers: pip install 'megatron_ttt[hf]'"
        raise ConfigError([Fault("style", "package", message)])
    from megatron_ttt.conversion.hf_config import TTT_SUFFIX
    from megatron_ttt.hf.auto_map import CLASSES, write_auto_map

    if model.family.name + TTT_SUFFIX not in CLASSES:
        message = f"there are no classes with fast weights for {model.family.name}; use reference"
        raise ConfigError([Fault("style", "package", message)])
    return write_auto_map


def _verifier(
    sides: Callable[[Any], tuple[Any, Any]], model: "ModelConfig", ttt: "TTTConfig"
) -> Callable[[Path], None]:
    """Return what compares a finished folder, not visible yet, with the source.

    ``sides`` takes the opened folder and returns (Hugging Face side, Megatron side).
    """
    if importlib.util.find_spec("transformers") is None:
        message = "needs transformers: pip install 'megatron_ttt[hf]'"
        raise ConfigError([Fault("verify", "true", message)])

    def check(path: Path) -> None:
        from megatron_ttt.training.quiet import quiet_libraries

        quiet_libraries()
        import megatron_ttt.hf  # noqa: F401 (registers the classes with fast weights)
        from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
        from megatron_ttt.config.schema import ComputeConfig
        from megatron_ttt.conversion.hf_folder import HFFolder
        from megatron_ttt.conversion.verification import compare_models, verify
        from megatron_ttt.training.distributed import distributed

        written = (MegatronFolder if (path / "metadata.json").exists() else HFFolder)(path)
        hf, megatron = sides(written)
        print("compared     largest error, of the largest value")
        with distributed(ComputeConfig()) as ranks:
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
    """Show a bar in bytes on the terminal; silent elsewhere."""
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


_WRITES = (Condition("dry_run", lambda keys: not keys.dry_run),)
_PLACES, _ALONE = ("checkpoint", "output"), "checkpoints are converted"
COMMANDS: dict[str, Command[Any]] = {
    "import": Command(
        Import,
        run_import,
        bounds={
            "seed": SEED,
            "ttt.layers": Bound(-INT32),
            "ttt.chunk_size": COUNT,
            "ttt.eta": Bound(0, 1e6),
        },
        effects={"verify": _WRITES},
        old={
            "--ttt-layers": "ttt.layers",
            "--ttt-chunk": "ttt.chunk_size",
            "--ttt-eta": "ttt.eta",
        },
        old_places=_PLACES,
        alone=_ALONE,
    ),
    "export": Command(
        Export,
        run_export,
        bounds={"shard_gib": Bound(0, 1e6, open=True)},
        effects={"verify": _WRITES, "shard_gib": _WRITES, "tokenizer": _WRITES},
        old_places=_PLACES,
        alone=_ALONE,
    ),
    "diff": Command(Diff, run_diff, files="folders", alone=_ALONE),
}


def main(argv: list[str]) -> int:
    """Run the chosen command; 2 for a mistake of the user, 1 if models differ."""
    warnings.showwarning = lambda message, *rest, **more: print(
        f"warning: {message}", file=sys.stderr
    )
    try:
        return run_command(argv, COMMANDS, __doc__)
    except VerificationFailed as error:
        print(f"verification failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
