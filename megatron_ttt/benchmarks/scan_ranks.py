"""Starts the ranks of the scan's benchmark: torchrun's, or gloo processes of this machine."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rich.console import Console

from megatron_ttt.benchmarks import scan as benchmark
from megatron_ttt.config.launcher import launched
from megatron_ttt.parallel.cost import save_topology
from megatron_ttt.scan_words import SequenceOrder
from megatron_ttt.training.distributed import local_device


@dataclass(frozen=True)
class ScanArguments:
    """Of ``tools/benchmark.py scan``."""

    ranks: int
    state_mb: float
    order: str
    repeats: int
    write_constants: Path | None
    json: Path | None


def run(arguments: ScanArguments) -> int:
    """Measure; raise ``ValueError`` for numbers that cannot be measured."""
    if arguments.state_mb <= 0 or arguments.repeats < 1:
        raise ValueError(
            f"state_mb={arguments.state_mb:g} and repeats={arguments.repeats}: must be positive"
        )
    launch = launched()
    if launch.world_size > 1:
        cuda = torch.cuda.is_available()
        device = None
        if cuda:
            local = local_device(launch.local_rank, torch.cuda.device_count())
            device = torch.device("cuda", local)
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
        _measure(arguments, device or torch.device("cpu"))
        return 0
    if arguments.ranks < 2:
        raise ValueError(f"ranks={arguments.ranks}: a scan needs at least two")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes.spawn(_local_rank, (arguments, store), nprocs=arguments.ranks)
    return 0


def _local_rank(rank: int, arguments: ScanArguments, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.ranks
    )
    _measure(arguments, torch.device("cpu"))


def _measure(arguments: ScanArguments, device: torch.device) -> None:
    problem = benchmark.ScanProblem(
        arguments.state_mb, SequenceOrder(arguments.order), arguments.repeats
    )
    report = benchmark.measure(problem, dist.group.WORLD, device)
    if dist.get_rank() == 0:
        benchmark.show(problem, report, Console(width=110))
        if arguments.write_constants is not None:
            save_topology(report.topology, arguments.write_constants)
        if arguments.json is not None:
            record = benchmark.as_record(problem, report)
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()
