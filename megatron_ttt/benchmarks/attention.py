"""Attention of one layer by documents: over planned tiles, and by masks of whole rows.

``masks`` is the usual way: blocks of queries against every key before them, a mask hiding what is
of another document. ``ours`` is ``model/attention.py``. Both run forward and backward on the same
numbers, alternating, and must agree before anything is printed.

Units: seconds of one CPU thread's process time, bytes that forward and backward hold at most beyond
their inputs. The floor is the time of the products over pairs that are visible, at the rate of one
large product.

Shape letters: B batch rows (1), T tokens, A heads, G key/value groups, E head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ttt.evaluation.memory import peak_bytes
from megatron_ttt.model.attention import attend
from megatron_ttt.model.attention_plan import LARGEST_BLOCK, plan_attention

TOLERANCE = 2e-5  # fp32 rounding of two orders of the same sums, relative to the norm
_PRODUCTS = 7  # of pairs x head dim: two forward, five backward, scores made again among them
_SQUARE = 2048


@dataclass(frozen=True)
class AttentionProblem:
    """Rows of ``tokens`` in equally long documents; ``window`` 0: none."""

    tokens: tuple[int, ...]
    documents: int
    window: int
    heads: int
    groups: int
    head_dim: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """What was measured at one length; every round's seconds."""

    tokens: int
    ours: list[float]
    masks: list[float]
    floor: float
    ours_bytes: int
    masks_bytes: int

    @property
    def ratios(self) -> list[float]:
        """Masks over ours, round by round."""
        return [slow / fast for slow, fast in zip(self.masks, self.ours, strict=True)]


class Disagreement(Exception):
    """The two differ by more than rounding."""


def measure(problem: AttentionProblem, report: Callable[[Row], None]) -> list[Row]:
    """Measure every length.

    Raises:
        Disagreement: outputs or gradients differ.
    """
    rows = []
    for tokens in problem.tokens:
        rows.append(_measure(problem, tokens))
        report(rows[-1])
    return rows


def _measure(problem: AttentionProblem, tokens: int) -> Row:
    runs = _runs(problem, tokens)
    error = max(
        float((one - other).norm() / other.norm())
        for one, other in zip(runs["ours"](), runs["masks"](), strict=True)
    )
    if not error < TOLERANCE:
        raise Disagreement(f"{tokens} tokens: outputs or gradients differ by {error:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(problem.rounds):
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
    cpu = torch.device("cpu")
    peaks = {name: peak_bytes(run, cpu) for name, run in runs.items()}
    floor = _floor(problem, tokens)
    return Row(tokens, seconds["ours"], seconds["masks"], floor, peaks["ours"], peaks["masks"])


def _runs(problem: AttentionProblem, tokens: int) -> dict[str, Callable[[], list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = inputs = [
        torch.randn(1, heads, tokens, problem.head_dim, generator=generator).requires_grad_()
        for heads in (problem.heads, problem.groups, problem.groups)
    ]
    upstream = torch.randn(inputs[0].shape, generator=generator)
    starts = torch.zeros(1, tokens, dtype=torch.bool)
    starts[0, _starts(problem, tokens)] = True
    plan = plan_attention(starts, batch=1, ranges=[(0, tokens)])
    documents, window = starts.cumsum(1), problem.window or None
    scale = problem.head_dim**-0.5

    def both_ways(output: Tensor) -> list[Tensor]:
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    return {
        "ours": lambda: both_ways(
            attend(query, key, value, plan=plan, packed=(), window=window, scale=scale)
        ),
        "masks": lambda: both_ways(_by_masks(query, key, value, documents, window, scale)),
    }


def _starts(problem: AttentionProblem, tokens: int) -> list[int]:
    return [number * tokens // problem.documents for number in range(problem.documents)]


def _by_masks(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, window: int | None, scale: float
) -> Tensor:
    places, outputs = torch.arange(query.shape[2]), []
    for begin in range(0, len(places), LARGEST_BLOCK):
        end = min(begin + LARGEST_BLOCK, len(places))
        low = 0 if window is None else max(0, begin - window + 1)
        distance = places[begin:end, None] - places[low:end]
        mask = (distance >= 0) & (documents[0, begin:end, None] == documents[0, low:end])
        if window is not None:
            mask &= distance < window
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end], key[:, :, low:end], value[:, :, low:end],
                attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2)


def _floor(problem: AttentionProblem, tokens: int) -> float:
    edges = [*_starts(problem, tokens), tokens]
    window, pairs = problem.window or tokens, 0
    for start, end in pairwise(edges):
        length = end - start
        whole = min(length, window)
        pairs += whole * (whole + 1) // 2 + (length - whole) * window
    matrix = torch.randn(_SQUARE, _SQUARE)
    rate = 2 * _SQUARE**3 / min(_seconds(lambda: matrix @ matrix) for _ in range(3))
    return _PRODUCTS * 2 * pairs * problem.heads * problem.head_dim / rate


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def report(problem: AttentionProblem, rows: Sequence[Row], console: Console) -> None:
    """Print a row per length."""
    window = f", window {problem.window}" if problem.window else ""
    title = (
        f"{problem.heads} heads, {problem.groups} groups, head dim {problem.head_dim},"
        f" {problem.documents} documents{window}, fp32, {torch.get_num_threads()} thread(s)"
    )
    console.print(title, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("tokens", "ours (floor)", "masks", "masks / ours (rounds)", "MB", "masks, MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.tokens),
            f"{statistics.median(row.ours) * 1e3:.0f} ms ({row.floor * 1e3:.0f})",
            f"{statistics.median(row.masks) * 1e3:.0f} ms",
            f"{statistics.median(row.ratios):.1f} ({min(row.ratios):.1f} to {max(row.ratios):.1f})",
            f"{row.ours_bytes / 1e6:.1f}",
            f"{row.masks_bytes / 1e6:.1f}",
        )
    console.print(table)


def as_record(problem: AttentionProblem, rows: Sequence[Row]) -> dict[str, Any]:
    """Return every number, for a file."""
    return {"problem": asdict(problem), "rows": [asdict(row) for row in rows]}
