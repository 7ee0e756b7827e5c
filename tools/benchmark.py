#!/usr/bin/env python3
"""Measure what the project claims about speed and memory.

python tools/benchmark.py fast-weight-layer chunk=64 part=mlp
python tools/benchmark.py fast-weight-layer hidden=2560 ffn=9728 tokens=65536 dtype=bf16 \\
    device=cuda output=layer.json
python tools/benchmark.py chunk-sizes sizes=[8,16,64,1024] against=256
python tools/benchmark.py attention tokens=[4096,8192,16384] documents=20
python tools/benchmark.py data megabytes=200 [tokenizer=FOLDER]
python tools/benchmark.py scan ranks=8 write_constants=constants.json
torchrun --nnodes 4 --nproc-per-node 8 ... tools/benchmark.py scan state_mb=200
python tools/benchmark.py decoding batch=[1,4]
python tools/benchmark.py checkpoint hidden=1024 layers=12 folder=/scratch
python tools/benchmark.py step model=tiny ttt.layers=null train.seq_length=4096
python tools/benchmark.py counted-step data.reset_attention=false
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from megatron_ttt.config.bounds import COUNT, Bound
from megatron_ttt.config.command import Command, run_command
from megatron_ttt.config.devices import Device
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.scan_words import SequenceOrder

# Torch takes seconds to import: --help and mistakes in the arguments do without it, so every
# command imports its benchmark when it runs.


@dataclass
class Measured:
    """Keys of every benchmark."""

    output: Path | None = None  # JSON file for every number

    def options(self) -> dict[str, Any]:
        """Return the keys of what is measured."""
        return {name: value for name, value in vars(self).items() if name != "output"}

    def write(self, record: dict[str, Any]) -> None:
        """Write every number to ``output``, if it is given."""
        if self.output is not None:
            self.output.write_text(json.dumps(record, indent=2) + "\n")

    def check(self) -> None:
        """Raise where ``output`` cannot be written, before anything is measured.

        Raises:
            ConfigError: its folder does not exist.
        """
        if self.output is not None and not self.output.parent.is_dir():
            raise ConfigError([Fault("output", self.output, "there is no such folder")])


@dataclass
class Layer(Measured):
    """Measure forward and backward of one layer: ours, the materialising one and a dense one."""

    hidden: int = 512
    ffn: int = 1536
    tokens: int = 8192
    chunk: int = 256  # tokens of a chunk
    part: str = "projection"  # projection, or mlp, the whole layer
    dtype: str = "fp32"  # fp32, bf16 or fp64
    device: str = "cpu"  # cpu or cuda
    repeats: int = 5  # measured rounds


def run_layer(keys: Layer) -> int:
    """Measure and print; 1 if the variants disagree."""
    from megatron_ttt.benchmarks import fast_weight_layer as benchmark
    from megatron_ttt.benchmarks import layer_report

    problem = benchmark.LayerProblem(**keys.options())
    try:
        measurements, difference = benchmark.measure(problem)
    except RuntimeError as error:
        return failed(error)
    layer_report.report(problem, measurements, difference, Console(width=110))
    keys.write(layer_report.as_record(problem, measurements, difference))
    return 0


@dataclass
class ChunkSizes(Measured):
    """Measure the fast-weight projection by the size of its chunks, in rounds over all sizes."""

    hidden: int = 512
    ffn: int = 1536
    tokens: int = 8192
    sizes: list[int] = field(default_factory=lambda: [8, 16, 64, 1024])  # tokens of a chunk
    against: int = 256  # what the others' times are divided by
    rounds: int = 9  # measured
    device: str = "cpu"  # cpu or cuda


def run_chunk_sizes(keys: ChunkSizes) -> int:
    """Measure and print; 1 if two forms of the computation disagree."""
    check_device(keys.device)
    from megatron_ttt.benchmarks import chunk_sizes as benchmark

    options = keys.options()
    problem = benchmark.ChunkProblem(sizes=tuple(options.pop("sizes")), **options)
    try:
        times = benchmark.measure(problem)
    except benchmark.Disagreement as error:
        return failed(error)
    benchmark.report(problem, times, Console())
    keys.write(benchmark.as_record(problem, times))
    return 0


@dataclass
class Attention(Measured):
    """Measure attention by documents on the CPU: over planned tiles, and by masks of whole rows."""

    tokens: list[int] = field(default_factory=lambda: [4096, 8192, 16384])
    documents: int = 20  # in a row, equally long
    window: int = 0  # tokens that a query sees; 0: all before it
    heads: int = 8
    groups: int = 4  # of keys and values
    head_dim: int = 64
    rounds: int = 3  # measured


def run_attention(keys: Attention) -> int:
    """Measure and print; 1 if the two disagree."""
    if keys.heads % keys.groups:
        message = f"must divide heads={keys.heads} evenly"
        raise ConfigError([Fault("groups", keys.groups, message)])
    if keys.documents > min(keys.tokens):
        message = f"a row has {min(keys.tokens)} tokens"
        raise ConfigError([Fault("documents", keys.documents, message)])
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    from megatron_ttt.benchmarks import attention as benchmark

    options = keys.options()
    problem = benchmark.AttentionProblem(tokens=tuple(options.pop("tokens")), **options)
    progress = Console(stderr=True)
    try:
        rows = benchmark.measure(
            problem, lambda row: progress.print(f"{row.tokens} tokens measured")
        )
    except benchmark.Disagreement as error:
        return failed(error)
    benchmark.report(problem, rows, Console())
    keys.write(benchmark.as_record(problem, rows))
    return 0


@dataclass
class Data(Measured):
    """Measure preprocessing and the loader, beside what a GPU takes."""

    megabytes: int = 100  # of text
    tokenizer: str = "bytes"  # bytes, or a tokenizer's folder
    lengths: list[int] = field(default_factory=lambda: [4096, 32768])  # tokens of a row
    model: str = "qwen3_0_6b"  # of configs/model, the fastest consumer
    device: Device = Device.h100  # a100, h100, h200, b200 or l40s
    utilisation: float = 0.45  # of its peak


def run_data(keys: Data) -> int:
    """Measure and print."""
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    from megatron_ttt.benchmarks import data as benchmark

    options = keys.options()
    problem = benchmark.DataProblem(lengths=tuple(options.pop("lengths")), **options)
    prepared, loaded = benchmark.measure(problem)
    benchmark.report(problem, prepared, loaded, Console())
    keys.write(benchmark.as_record(problem, prepared, loaded))
    return 0


@dataclass
class Checkpoint(Measured):
    """Measure how long a step waits for a checkpoint, saved in the background and not."""

    hidden: int = 512
    layers: int = 8
    repeats: int = 3  # saves in each mode
    folder: Path | None = None  # on the file system to measure; null: a temporary one


def run_checkpoint(keys: Checkpoint) -> int:
    """Measure and print; 1 if a checkpoint cannot be saved."""
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    from megatron_ttt.benchmarks import checkpoint as benchmark
    from megatron_ttt.training.checkpoint_saver import SaveFailed

    problem = benchmark.SaveProblem(**keys.options())
    try:
        report = benchmark.measure(problem)
    except SaveFailed as error:
        return failed(error)
    benchmark.show(problem, report, Console())
    keys.write(benchmark.as_record(problem, report))
    return 0


@dataclass
class Conversion(Measured):
    """Measure a random checkpoint of real shapes, to Megatron and back: time and peak memory."""

    model: str = "qwen3_4b"  # of configs/model
    folder: Path = Path("outputs/benchmark_conversion")  # must not exist; removed afterwards
    verify: bool = False  # also an import with verify=true


def run_conversion(keys: Conversion) -> int:
    """Measure and print; 1 if a conversion fails."""
    from megatron_ttt.benchmarks import conversion as benchmark
    from megatron_ttt.config.load import load_config

    model = load_config([f"+model={keys.model}", "run.dry_run=true"]).model
    if keys.folder.exists():
        raise ConfigError([Fault("folder", keys.folder, "exists")])
    program = [sys.executable, str(Path(__file__).with_name("convert_checkpoint.py"))]
    try:
        size, rows = benchmark.measure(model, program, keys.folder, verify=keys.verify)
    except RuntimeError as error:
        return failed(error)
    benchmark.report(model, size, rows, Console())
    keys.write(benchmark.as_record(model, size, rows))
    return 0


@dataclass
class Decoding(Measured):
    """Measure what a generated token costs, with fast weights on and off."""

    hidden: int = 512
    ffn: int = 1536
    layers: int = 12
    chunk: int = 128  # tokens of a chunk and of a round
    batch: list[int] = field(default_factory=lambda: [1, 4])  # rows
    rounds: int = 5  # measured
    dtype: str = "fp32"  # fp32 or bf16
    device: str = "cpu"  # cpu or cuda


def run_decoding(keys: Decoding) -> int:
    """Measure and print."""
    check_device(keys.device)
    if keys.dtype not in ("fp32", "bf16"):
        raise ConfigError([Fault("dtype", keys.dtype, "must be one of fp32, bf16")])
    from megatron_ttt.benchmarks import decoding as benchmark

    options = keys.options()
    problem = benchmark.DecodingProblem(batches=tuple(options.pop("batch")), **options)
    times = benchmark.measure(problem)
    benchmark.report(problem, times, Console())
    keys.write(benchmark.as_record(problem, times))
    return 0


@dataclass
class Scan(Measured):
    """Measure the scan's links and algorithms beside the cost model's prediction."""

    ranks: int = 4  # local processes; under torchrun its own
    state_mb: float = 25.0  # one rank's state
    order: SequenceOrder = SequenceOrder.zigzag
    repeats: int = 9  # measured rounds
    write_constants: Path | None = None  # file, for parallel.scan_constants


def run_scan(keys: Scan) -> int:
    """Measure on the ranks of torchrun, or on local ones; rank 0 prints."""
    from megatron_ttt.benchmarks import scan_ranks

    options = keys.options() | {"order": keys.order.value}
    return scan_ranks.run(scan_ranks.ScanArguments(**options, json=keys.output))


@dataclass
class CountedStep(Measured):
    """Count kernels, bytes, FLOPs, waits and memory of one micro-batch, without a GPU.

    All other keys are those of launch/pretrain.py.
    """

    model: str = "qwen3_4b"  # of configs/model
    documents: int = 1  # in each row, equally long
    overrides: list[str] = field(default_factory=list)


def run_counted_step(keys: CountedStep) -> int:
    """Count and print."""
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    from megatron_ttt.benchmarks import counted_step as benchmark
    from megatron_ttt.config.derived import model_parallel_size
    from megatron_ttt.config.load import check, load_config

    words = [f"+model={keys.model}", "run.dry_run=true", "train.precision=bf16", *keys.overrides]
    config = load_config(words)
    check(config, world_size=model_parallel_size(config.parallel))
    if keys.documents > config.train.seq_length:
        message = f"a row has {config.train.seq_length} tokens"
        raise ConfigError([Fault("documents", keys.documents, message)])
    counted = benchmark.measure(config, documents=keys.documents)
    benchmark.report(counted, Console(width=140))
    keys.write(benchmark.as_record(counted, words, keys.documents))
    return 0


@dataclass
class Step(Measured):
    """Measure a training step with fast weights on and off, in alternating rounds.

    All other keys are those of launch/pretrain.py.
    """

    model: str = "tiny"  # of configs/model
    rounds: int = 9  # measured
    overrides: list[str] = field(default_factory=list)


def run_step(keys: Step) -> int:
    """Measure and print."""
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    from megatron_ttt.benchmarks import step_ratio as benchmark
    from megatron_ttt.config.load import check, load_config

    one = ["run.dry_run=true", "train.micro_batch_size=1", "train.global_batch_size=1"]
    words = [f"+model={keys.model}", *one, *keys.overrides]
    on, off = (load_config([*words, switch]) for switch in ("ttt=in_place", "ttt=off"))
    check(on, world_size=1)
    found = benchmark.measure(on, off, rounds=keys.rounds)
    benchmark.report(on, found, Console())
    keys.write(benchmark.as_record(found, words))
    return 0


def check_device(device: str) -> None:
    """Raise for a device that is not there.

    Raises:
        ConfigError: no device, or one that this machine lacks.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError([Fault("device", device, "must be one of cpu, cuda")])
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Fault("device", device, "there is no GPU here; use cpu")])


def failed(error: Exception) -> int:
    """Print why nothing was measured; return the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 1


def command(keys: type, run: Any, *counts: str, **options: Any) -> Command[Any]:
    """Return a command; each of ``counts`` is a whole number of at least 1."""

    def checked(given: Any) -> int:
        given.check()
        status: int = run(given)
        return status

    bounds = {**dict.fromkeys(counts, COUNT), **options.pop("bounds", {})}
    return Command(keys, checked, bounds=bounds, old={"--json": "output"}, **options)


COMMANDS = {
    "fast-weight-layer": command(Layer, run_layer, "hidden", "ffn", "tokens", "chunk", "repeats"),
    "chunk-sizes": command(
        ChunkSizes, run_chunk_sizes, "hidden", "ffn", "tokens", "sizes", "against", "rounds"
    ),
    "attention": command(
        Attention,
        run_attention,
        *("tokens", "documents", "heads", "groups", "head_dim", "rounds"),
        bounds={"window": Bound(0)},
    ),
    "data": command(
        Data, run_data, "megabytes", "lengths", bounds={"utilisation": Bound(0, 1, open=True)}
    ),
    "checkpoint": command(Checkpoint, run_checkpoint, "hidden", "layers", "repeats"),
    "conversion": command(Conversion, run_conversion),
    "scan": command(
        Scan, run_scan, "ranks", "repeats", bounds={"state_mb": Bound(0, 1e6, open=True)}
    ),
    "decoding": command(
        Decoding, run_decoding, "hidden", "ffn", "layers", "chunk", "batch", "rounds"
    ),
    "step": command(Step, run_step, "rounds", passes="overrides"),
    "counted-step": command(CountedStep, run_counted_step, "documents", passes="overrides"),
}


def main(argv: list[str]) -> int:
    """Run the chosen benchmark; 2 for a mistake of the user, in one line."""
    return run_command(argv, COMMANDS, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
