"""Lives of a training program: started, killed at chosen moments, started again.

A server process imports the libraries once and forks every life from there, so that a life costs
what it does and not the seconds of its imports. What runs in it is ``launch/pretrain.py``'s own
path, from the command line to the exit status.
"""

import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ttt.config.load import run_with_config
from megatron_ttt.training.quiet import quiet_libraries

STEPS = 20
CLOCK = {"tokens_per_second", "tflops_per_device", "step_time_s", "peak_memory_bytes", "mfu"}
TINY = [
    "+model=tiny",
    "model.layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.heads=2",
    "model.kv_groups=2",
    "model.head_dim=16",
    "model.sliding_window=32",
    "ttt.layers=[0,1]",
    "ttt.chunk_size=16",
    "ttt.target=hidden_states",
    "ttt.eta=0.008",
    "train.seq_length=128",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    f"train.steps={STEPS}",
    "optimizer.warmup_steps=0",
    "validation.interval=null",
    "checkpoint.interval=10",
    "data.workers=0",
    "logging.sample_ids=true",
]


def context() -> multiprocessing.context.ForkServerContext:
    """The server that lives are forked from; it has imported this module and torch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.end_to_end.lives", "tests.end_to_end.preloaded"])
    return server


def live(words: list[str], log: str, environment: dict[str, str], largest_file: int | None) -> None:
    """The whole life of one rank."""
    os.setpgid(0, 0)  # a signal to the group then reaches what the rank starts, and no one else
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if largest_file is not None:  # the system then refuses to write, as it does on a full disk
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    quiet_libraries()
    from megatron_ttt.training.loop import pretrain

    sys.exit(run_with_config(pretrain, words))


@dataclass
class Life:
    """The processes of one start of the program, one per rank."""

    processes: list[multiprocessing.process.BaseProcess]
    log: Path

    @property
    def text(self) -> str:
        """What all ranks printed, so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self) -> int:
        """Exit status of rank 0."""
        for process in self.processes:
            process.join(timeout=120)
            assert process.exitcode is not None, f"still running:\n{self.text}"
        status = self.processes[0].exitcode
        assert status is not None
        return status

    def when(self, seen: Callable[[], bool]) -> None:
        """Wait for a moment."""
        deadline = time.monotonic() + 120
        while not seen():
            assert all(process.is_alive() for process in self.processes), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.001)

    def kill(self) -> None:
        """``kill -9``, all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@dataclass
class Run:
    """A run directory, and how the program is started in it."""

    folder: Path
    changes: list[str] = field(default_factory=list)
    lives: int = 0

    @property
    def checkpoints(self) -> Path:
        """Where the run keeps them."""
        return self.folder / "checkpoints"

    def start(self, *more: str, ranks: int = 1, largest_file: int | None = None) -> Life:
        """Begin a life."""
        self.lives += 1
        log = self.folder.with_name(f"{self.folder.name}_{self.lives}.log")
        words = [*TINY, f"run.dir={self.folder}", *self.changes, *more]
        shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(ranks)}
        processes = []
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (words, str(log), environment, largest_file)
            processes.append(context().Process(target=live, args=arguments))
            processes[-1].start()
        return Life(list(processes), log)

    def complete(self, *more: str, ranks: int = 1) -> str:
        """A life that must end well; what it printed."""
        life = self.start(*more, ranks=ranks)
        assert life.wait() == 0, life.text
        return life.text

    def steps(self) -> int:
        """Rows of ``metrics.jsonl`` so far."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def rows(self) -> list[dict[str, float]]:
        """``metrics.jsonl`` without what the clock decides."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: row[key] for key in row if key not in CLOCK} for row in rows]

    def samples(self) -> dict[int, list[int]]:
        """Samples of each step, as it was done last."""
        lines = (self.folder / "samples.jsonl").read_text().splitlines()
        return {row["step"]: row["samples"] for row in map(json.loads, lines)}

    def saving(self) -> bool:
        """Whether a checkpoint is half written at this moment."""
        return any(self.checkpoints.glob("step_*.partial*"))


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def every_sample_once() -> dict[int, list[int]]:
    """What :meth:`Run.samples` must be after a whole run."""
    return {step: list(range(4 * step - 4, 4 * step)) for step in range(1, STEPS + 1)}
