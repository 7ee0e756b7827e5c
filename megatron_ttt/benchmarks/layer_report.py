"""What is printed and written of the fast-weight layer's benchmark."""

from __future__ import annotations

import statistics
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from megatron_ttt.benchmarks.fast_weight_layer import LayerProblem, Measurement


def ratios(measurements: list[Measurement]) -> dict[str, dict[str, float]]:
    """How many times ours each other variant takes: of the best times, and round by round."""
    ours, *others = measurements
    return {
        other.name: {
            "best": other.best / ours.best,
            **_spread([b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]),
        }
        for other in others
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"lowest": min(values), "median": statistics.median(values), "highest": max(values)}


def as_record(
    problem: LayerProblem, measurements: list[Measurement], difference: float
) -> dict[str, object]:
    """Everything measured, for a JSON file."""
    return {
        "problem": asdict(problem),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "largest_relative_difference": difference,
        "variants": [asdict(measurement) for measurement in measurements],
        "times_ours": ratios(measurements),
    }


def report(
    problem: LayerProblem, measurements: list[Measurement], difference: float, console: Console
) -> None:
    """Print the table, and one line per comparison."""
    table = Table(
        title=f"{problem.part}, forward + backward: hidden {problem.hidden}, ffn {problem.ffn}, "
        f"{problem.tokens} tokens, chunk {problem.chunk}, {problem.dtype}, {problem.device}"
    )
    table.add_column("variant", no_wrap=True)
    headings = (
        "best ms",
        "worst ms",
        "GEMM floor ms",
        "matrix MB",
        "peak MB",
        "extra MB",
        "launches",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for measurement in measurements:
        table.add_row(
            measurement.name,
            f"{measurement.best * 1e3:.1f}",
            f"{max(measurement.seconds) * 1e3:.1f}",
            f"{measurement.floor_seconds * 1e3:.1f}",
            f"{measurement.matrix_traffic_bytes / 1e6:.0f}",
            f"{measurement.peak_bytes / 1e6:.1f}",
            f"{measurement.extra_bytes / 1e6:.1f}",
            f"{measurement.launches:,}",
        )
    console.print(table)
    console.print(
        "GEMM floor: the variant's products at the rate of one large one. matrix: its hidden x ffn "
        "matrices read and written. peak: beyond inputs. extra: beyond dense. "
        "launches: kernels of a GPU, counted on meta tensors.",
        style="dim",
    )
    for name, ratio in ratios(measurements).items():
        console.print(
            f"{name} takes {ratio['best']:.2f} times ours "
            f"(rounds {ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        )
    ours, materialising, _ = measurements
    console.print(
        f"extra memory: {ours.extra_bytes / materialising.extra_bytes:.3f} of materialising; "
        f"largest relative difference {difference:.1e}; "
        f"threads: {torch.get_num_threads()}"
    )
