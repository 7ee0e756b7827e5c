"""How fast texts become tokens and tokens become batches, beside what a GPU takes.

Preprocessing is one worker over a JSONL file, in bytes of text per second of elapsed and of CPU
time. The loader is the training run's own, with ``data.workers=0``, so that one core makes every
batch; what a GPU takes is its peak times the assumed utilisation over the model's operations for a
token (``config/flops.py``). Units: seconds, bytes, tokens.
"""

from __future__ import annotations

import json
import resource
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ttt.config.devices import Device
from megatron_ttt.config.flops import training_flops_per_token
from megatron_ttt.config.load import load_config
from megatron_ttt.data.batches import build_data
from megatron_ttt.data.preprocessing import PreprocessOptions, preprocess
from megatron_ttt.data.sources import open_source

_WARM, _COUNTED = 20, 200


@dataclass(frozen=True)
class DataProblem:
    """What is measured: a corpus of ``megabytes`` of Python source, rows of ``lengths``."""

    megabytes: int
    tokenizer: str
    lengths: tuple[int, ...]
    model: str
    device: Device
    utilisation: float


@dataclass(frozen=True)
class Preprocessed:
    """One worker's work."""

    text_bytes: int
    tokens: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Loaded:
    """Tokens a second of the loader at one length, and of one GPU that trains."""

    length: int
    rate: float
    consumed: float


def measure(problem: DataProblem) -> tuple[Preprocessed, list[Loaded]]:
    """Prepare a corpus in a temporary folder, then read batches of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = _preprocess(problem, folder)
        return prepared, [_load(problem, folder, length) for length in problem.lengths]


def _preprocess(problem: DataProblem, folder: Path) -> Preprocessed:
    texts = folder / "texts.jsonl"
    size = _write_texts(texts, problem.megabytes * 10**6)
    kind = "bytes" if problem.tokenizer == "bytes" else "huggingface"
    options = PreprocessOptions(
        inputs=(str(texts),),
        output=str(folder / "corpus"),
        tokenizer_kind=kind,
        tokenizer_name=None if kind == "bytes" else problem.tokenizer,
        workers=1,
    )
    begin, cpu = time.perf_counter(), _cpu_seconds()
    summary = preprocess(options)
    return Preprocessed(size, summary.new_tokens, time.perf_counter() - begin, _cpu_seconds() - cpu)


def _write_texts(path: Path, size: int) -> int:
    """Write the standard library's files, again and again, up to a size; the text's bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    written = 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            for file in files:
                text = file.read_bytes().decode("utf-8", errors="ignore")
                if not text.strip():
                    continue
                out.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= size:
                    break
    return written


def _load(problem: DataProblem, folder: Path, length: int) -> Loaded:
    kind = "bytes" if problem.tokenizer == "bytes" else "huggingface"
    config = load_config(
        [
            f"+model={problem.model}",
            f"data.path={folder / 'corpus'}",
            f"data.tokenizer.kind={kind}",
            f"data.tokenizer.name={'null' if kind == 'bytes' else problem.tokenizer}",
            f"data.cache_dir={folder / 'cache'}",
            "data.workers=0",
            f"train.seq_length={length}",
            "train.global_batch_size=1",
            "train.micro_batch_size=1",
        ]
    )
    source = open_source(
        config.data,
        vocab_size=config.model.vocab_size,
        is_builder=True,
        barrier=lambda: None,
    )
    samples = _WARM + _COUNTED
    batches = build_data(
        config,
        source,
        dp_rank=0,
        dp_size=1,
        consumed_samples=0,
        train_samples=samples,
        is_builder=True,
    ).train_iterator
    for _ in range(_WARM):
        next(batches)
    begin = time.perf_counter()
    for _ in range(_COUNTED):
        next(batches)
    rate = _COUNTED * length / (time.perf_counter() - begin)
    flops = problem.device.value.peak_tflops * 1e12 * problem.utilisation
    return Loaded(length, rate, flops / training_flops_per_token(config))


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for; finer than the clock of ``os.times``."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def report(
    problem: DataProblem, prepared: Preprocessed, loaded: Sequence[Loaded], console: Console
) -> None:
    """Print one line of preprocessing and a row per length."""
    megabytes = prepared.text_bytes / 1e6
    console.print(
        f"preprocessing, tokenizer={problem.tokenizer}: {megabytes:.0f} MB of text,"
        f" {prepared.tokens / 1e6:.1f} M tokens; {megabytes / prepared.seconds:.1f} MB/s,"
        f" {megabytes / prepared.cpu_seconds:.1f} MB per CPU second",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    device = f"{problem.model} on one {problem.device.name} at {problem.utilisation:.0%}"
    for heading in ("row", "loader, one core", device, "times"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in loaded:
        table.add_row(
            str(row.length),
            f"{row.rate / 1e6:.1f} M tokens/s",
            f"{row.consumed / 1e3:.1f} k tokens/s",
            f"{row.rate / row.consumed:.0f}",
        )
    console.print(table)


def as_record(
    problem: DataProblem, prepared: Preprocessed, loaded: Sequence[Loaded]
) -> dict[str, Any]:
    """Return every number, for a file."""
    own = asdict(problem) | {"device": problem.device.name}
    return {
        "problem": own,
        "preprocessing": asdict(prepared),
        "loader": [asdict(row) for row in loaded],
    }
