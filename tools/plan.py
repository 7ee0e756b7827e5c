"""Plans a run without starting it: what a configuration amounts to, and what it costs.

python tools/plan.py model +model=qwen3_4b parallel.tp=2 parallel.cp=4 [ranks=16]
python tools/plan.py memory +model=qwen3_14b parallel.tp=4 parallel.cp=2 device=h100 [ranks=64]
python tools/plan.py scan +model=qwen3_8b parallel.cp=8 train.seq_length=32768 plot=scan.png

All other keys are those of launch/pretrain.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ttt.config.bounds import COUNT, Bound
from megatron_ttt.config.command import Command, run_command, tell
from megatron_ttt.config.derived import model_parallel_size
from megatron_ttt.config.devices import Device
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.load import PRETRAINING, check, describe, load_config, tell_idle_keys
from megatron_ttt.config.overrides import names_checkpoint
from megatron_ttt.config.schema import Config, Precision


@dataclass
class ModelKeys:
    """Print what a configuration would build, for any number of ranks."""

    ranks: int | None = None  # processes; null: one copy of the model
    overrides: list[str] = field(default_factory=list)


@dataclass
class MemoryKeys:
    """Print what a device of each pipeline stage holds, by part, in bf16."""

    ranks: int | None = None  # processes; null: one copy of the model
    device: Device = Device.h100  # a100, h100, h200, b200 or l40s
    documents: int = 1  # in each row, equally long
    output: Path | None = None  # JSON file for every number
    overrides: list[str] = field(default_factory=list)


@dataclass
class ScanKeys:
    """Print what the scan costs on 2 to 4096 ranks; constants from parallel.scan_constants."""

    tflops: float = 400.0  # achieved per device
    plot: Path | None = None  # PNG file; also draw it
    overrides: list[str] = field(default_factory=list)


def _checked(overrides: Sequence[str], ranks: int | None) -> tuple[Config, int]:
    said: Sequence[str] = ()
    if any(names_checkpoint(word) for word in overrides):
        from megatron_ttt.conversion.model_words import spelled_out  # imports torch

        said, overrides = spelled_out(overrides)
    config = load_config([*said, *overrides, "run.dry_run=true"])
    ranks = ranks or model_parallel_size(config.parallel)
    check(config, world_size=ranks)
    tell_idle_keys(PRETRAINING, config, overrides)
    return config, ranks


def plan_model(keys: ModelKeys) -> int:
    """Print the resolved configuration, parameter counts, states, spans and batches."""
    config, ranks = _checked(keys.overrides, keys.ranks)
    print(describe(config, world_size=ranks))
    return 0


def plan_memory(keys: MemoryKeys) -> int:
    """Print the table; 1 if it does not fit, with what would."""
    config, ranks = _checked(keys.overrides, keys.ranks)
    if keys.documents > config.train.seq_length:
        message = f"a row has {config.train.seq_length} tokens"
        raise ConfigError([Fault("documents", keys.documents, message)])
    from megatron_ttt.training.quiet import quiet_libraries

    quiet_libraries()
    import json

    from rich.console import Console

    from megatron_ttt.benchmarks import memory_plan

    config.train.precision = Precision.bf16
    console = Console()
    stages = memory_plan.plan_memory(config, ranks=ranks, documents=keys.documents)
    memory_plan.report(config, stages, keys.device, console)
    if keys.output is not None:
        keys.output.write_text(json.dumps(memory_plan.as_record(stages), indent=2) + "\n")
    if memory_plan.fits(stages, keys.device):
        return 0
    for line in memory_plan.advice(
        config, ranks=ranks, device=keys.device, documents=keys.documents
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    return 1


def plan_scan(keys: ScanKeys) -> int:
    """Print the cost model's table."""
    # torch takes seconds to import: the other command does without it
    from rich.console import Console

    from megatron_ttt.benchmarks import scan_plan
    from megatron_ttt.parallel.cost import GPU_CLUSTER, load_topology

    config, _ = _checked(keys.overrides, None)
    path = config.parallel.scan_constants
    topology = GPU_CLUSTER if path is None else load_topology(Path(path))
    flops = keys.tflops * 1e12
    rows = scan_plan.plan_rows(config, topology, flops=flops)
    scan_plan.show(config, rows, flops=flops, console=Console(width=140))
    if keys.plot is not None:
        order = config.parallel.cp_order.value
        scan_plan.plot(rows, keys.plot, title=f"scan of {config.model.name}, {order}")
        print(f"plot: {keys.plot}")
    return 0


COMMANDS: dict[str, Command[Any]] = {
    "model": Command(ModelKeys, plan_model, bounds={"ranks": COUNT}, passes="overrides"),
    "memory": Command(
        MemoryKeys, plan_memory, bounds={"ranks": COUNT, "documents": COUNT}, passes="overrides"
    ),
    "scan": Command(
        ScanKeys, plan_scan, bounds={"tflops": Bound(0, 1e9, open=True)}, passes="overrides"
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run the chosen command; 2 for a mistake of the user, one line per fault."""
    try:
        return run_command(argv, COMMANDS, __doc__)
    except OSError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
