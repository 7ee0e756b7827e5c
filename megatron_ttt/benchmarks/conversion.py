"""Conversion of a synthetic checkpoint of real shapes, both ways: time and peak memory."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, row_blocks
from megatron_ttt.config.schema import ModelConfig
from megatron_ttt.conversion.exporting import SHARD_BYTES, Piece, shards_of, write_shard
from megatron_ttt.conversion.hf_config import hf_from_model
from megatron_ttt.conversion.hf_folder import CONFIG, INDEX
from megatron_ttt.conversion.mapping import TargetGenerator, build_mapping

GIB = 1 << 30


@dataclass(frozen=True)
class Measurement:
    """One conversion in a process of its own.

    Attributes:
        what: which.
        seconds: wall time, imports and checksums included.
        peak_bytes: largest resident set of the process, mapped files included.
        allowed_bytes: twice the largest tensor and 1 GiB; ``None`` where it does not apply.
    """

    what: str
    seconds: float
    peak_bytes: int
    allowed_bytes: int | None


def measure(
    model: ModelConfig, program: Sequence[str], folder: Path, *, verify: bool
) -> tuple[int, list[Measurement]]:
    """Write a random bf16 checkpoint, import it, export it, compare, and clean up.

    Args:
        model: its shapes.
        program: the command line of ``convert_checkpoint.py``, without arguments.
        folder: for about three times the checkpoint's size; emptied afterwards.
        verify: also measure an import with ``verify=true``.

    Returns:
        The checkpoint's bytes, and the measurements.

    Raises:
        RuntimeError: a conversion failed, or the round trip changed a tensor.
    """
    folder.mkdir(parents=True)
    try:
        source, imported, exported = (str(folder / name) for name in ("hf", "megatron", "back"))
        size, largest = write_synthetic(model, Path(source))
        allowed = 2 * largest + GIB
        plain = [*program, "import", f"checkpoint={source}", f"output={imported}", "ttt.layers=[]"]
        rows = [_run("import", plain, allowed)]
        rows.append(
            _run(
                "export",
                [*program, "export", f"checkpoint={imported}", f"output={exported}"],
                allowed,
            )
        )
        _run("diff", [*program, "diff", source, exported], None)
        shutil.rmtree(exported)
        if verify:
            shutil.rmtree(imported)
            rows.append(_run("import verify=true", [*plain, "verify=true"], None))
        return size, rows
    finally:
        shutil.rmtree(folder)


def write_synthetic(model: ModelConfig, folder: Path) -> tuple[int, int]:
    """Return a Hugging Face folder of random bf16 values (a pool of 32 million, shifted per block).

    Returns:
        Bytes of all tensors, and of the largest.
    """
    folder.mkdir()
    mapping = build_mapping(model, TargetGenerator(()))
    pieces = [Piece(name, shape, torch.bfloat16, ()) for name, shape in mapping.hf_shapes().items()]
    generator = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(BLOCK_BYTES // 2, generator=generator)).bfloat16()

    def blocks(piece: Piece) -> Iterator[Tensor]:
        for start, stop in row_blocks(piece.shape, piece.dtype, BLOCK_BYTES // 2):
            count = (stop - start) * math.prod(piece.shape[1:])
            shift = int(torch.randint(len(pool) - count + 1, (), generator=generator))
            yield pool[shift : shift + count].view(stop - start, *piece.shape[1:])

    shards = shards_of(pieces, SHARD_BYTES)
    for file, members in shards.items():
        with (folder / file).open("wb") as stream:
            write_shard(stream, members, blocks, lambda name, size: None)
    weights = {piece.name: file for file, members in shards.items() for piece in members}
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))
    config = {**hf_from_model(model), "torch_dtype": "bfloat16"}
    (folder / CONFIG).write_text(json.dumps(config))
    return sum(piece.bytes for piece in pieces), max(piece.bytes for piece in pieces)


def report(model: ModelConfig, size: int, rows: list[Measurement], console: Console) -> None:
    """Print the table of ``docs/benchmarks.md``."""
    console.print(f"{model.name}: {size / GIB:.2f} GiB of random bf16, {os.cpu_count()} cores")
    table = Table("", "seconds", "GiB/s", "peak memory", "allowed")
    for row in rows:
        speed = f"{size / GIB / row.seconds:.2f}"
        allowed = "" if row.allowed_bytes is None else f"{row.allowed_bytes / GIB:.2f} GiB"
        peak = f"{row.peak_bytes / GIB:.2f} GiB"
        table.add_row(row.what, f"{row.seconds:.1f}", speed, peak, allowed)
    console.print(table)


def as_record(model: ModelConfig, size: int, rows: list[Measurement]) -> dict[str, Any]:
    """Every number, for a file."""
    return {"model": model.name, "bytes": size, "measurements": [asdict(row) for row in rows]}


def _run(what: str, command: list[str], allowed: int | None) -> Measurement:
    """Run to the end; the kernel reports the child's own peak."""
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        last = output.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"{what} ended with {child.returncode}: {last[0]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measurement(what, time.monotonic() - began, usage.ru_maxrss * unit, allowed)
