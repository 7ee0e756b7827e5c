"""Forward and backward of the fast-weight projection, by the size of its chunks.

All sizes run on the same numbers, one after the other in every round, so that a ratio compares
times of one round. Before a time is taken, the outputs and gradients of every size are compared
with those that groups of one chunk give, which touch the state at every chunk.

Times are CPU time of the process on a CPU, where other work on the machine would count otherwise,
and elapsed time on a GPU. Units: seconds.

Shape suffixes: T tokens, D hidden, F ffn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ttt.fast_weights import Write, fast_weight_scan
from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks

TOLERANCE = 2e-5  # fp32 rounding of two orders of the same sums, relative to the norm
ETA = 1e-4


@dataclass(frozen=True)
class ChunkProblem:
    """What is measured: chunks of ``sizes`` tokens against those of ``against``."""

    hidden: int
    ffn: int
    tokens: int
    sizes: tuple[int, ...]
    against: int
    rounds: int
    device: str

    def all_sizes(self) -> list[int]:
        """Every size once, ``against`` first."""
        return [self.against, *(size for size in self.sizes if size != self.against)]


class Disagreement(Exception):
    """Two forms of the same computation differ by more than rounding."""


def measure(problem: ChunkProblem) -> dict[int, list[float]]:
    """Return every round's time by size; a round before the first is not counted.

    Raises:
        Disagreement: the sizes' groups compute something else than single chunks.
    """
    run = _runner(problem)
    clock = time.perf_counter if problem.device == "cuda" else time.process_time
    plans = {size: _plan(problem, size) for size in problem.all_sizes()}
    for size, plan in plans.items():
        pairs = zip(run(plan, None), run(plan, 1), strict=True)
        error = max(_error(one, other) for one, other in pairs)
        if error > TOLERANCE:
            raise Disagreement(f"chunks of {size}: groups differ from single chunks by {error:.1e}")
    times: dict[int, list[float]] = {size: [] for size in plans}
    for _ in range(problem.rounds):
        for size, plan in plans.items():
            begin = clock()
            run(plan, None)
            if problem.device == "cuda":
                torch.cuda.synchronize()
            times[size].append(clock() - begin)
    return times


def report(problem: ChunkProblem, times: dict[int, list[float]], console: Console) -> None:
    """Print a row per size, with its ratio to ``against`` round by round."""
    title = (
        f"hidden {problem.hidden}, ffn {problem.ffn}, {problem.tokens} tokens, {problem.device},"
        f" fp32, {torch.get_num_threads()} thread(s), {problem.rounds} rounds"
    )
    console.print(title, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("chunk", "median", "best to worst", f"of chunk {problem.against} (rounds)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for size in sorted(times):
        own, ratios = times[size], ratios_of(times, size, problem.against)
        table.add_row(
            str(size),
            f"{statistics.median(own) * 1e3:.0f} ms",
            f"{min(own) * 1e3:.0f} to {max(own) * 1e3:.0f} ms",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    console.print(table)


def ratios_of(times: dict[int, list[float]], size: int, against: int) -> list[float]:
    """Return a size's time over that of ``against``, round by round."""
    return [one / other for one, other in zip(times[size], times[against], strict=True)]


def as_record(problem: ChunkProblem, times: dict[int, list[float]]) -> dict[str, Any]:
    """Return every number, for a file."""
    return {"problem": asdict(problem), "seconds": times}


def _runner(problem: ChunkProblem) -> Callable[[ChunkPlan, int | None], list[Tensor]]:
    """Return what runs both directions and returns outputs and gradients."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(problem.device)

    tokens, hidden, ffn = problem.tokens, problem.hidden, problem.ffn
    keys_BTF, targets_BTD = drawn(1, tokens, ffn), drawn(1, tokens, hidden)
    weight_DF, upstream_BTD = drawn(hidden, ffn) / ffn**0.5, drawn(1, tokens, hidden)
    inputs = [tensor.requires_grad_() for tensor in (keys_BTF, targets_BTD, weight_DF)]

    def run(plan: ChunkPlan, group_chunks: int | None) -> list[Tensor]:
        found = fast_weight_scan(
            keys_BTF, Write(targets_BTD), weight_DF, plan=plan, eta=ETA, group_chunks=group_chunks
        )
        return [
            found.outputs_BTD.detach(),
            *torch.autograd.grad(found.outputs_BTD, inputs, upstream_BTD),
        ]

    return run


def _plan(problem: ChunkProblem, size: int) -> ChunkPlan:
    device = torch.device(problem.device)
    return plan_chunks(None, batch=1, length=problem.tokens, chunk_size=size, device=device)


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
