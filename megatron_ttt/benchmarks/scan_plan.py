"""Predicts what the scan costs a configuration on 2 to 4096 context-parallel ranks.

Tokens per rank stay those of the configuration (``seq_length / cp``): more ranks read longer
sequences. One GEMM unit is ``2 * tokens * hidden * ffn / tp`` operations at the given rate; what a
scan can hide behind are the units that do not wait for it: forward half a unit in zigzag order (the
second span's summary), backward that half and two more (the keys' gradient through ``W0 + eta*S``
and the states it needs).
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ttt.config.derived import micro_batches, model_parallel_size, ttt_layers
from megatron_ttt.config.schema import CommPrecision, Config
from megatron_ttt.parallel.cost import Prediction, Topology, choose, predict
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

RANKS = tuple(1 << power for power in range(1, 13))
BACKWARD_UNITS = 2.0


@dataclass(frozen=True)
class PlanRow:
    """Seconds and bytes of one layer are of one forward and one backward scan together."""

    ranks: int
    sequence: int
    predictions: dict[ScanAlgorithm, Prediction]
    chosen: Prediction
    exposed_s: float
    step_exposed_s: float

    @property
    def seconds(self) -> float:
        return 2 * self.chosen.seconds

    @property
    def bytes_sent(self) -> int:
        return 2 * self.chosen.bytes_sent


def state_bytes(config: Config) -> int:
    """Of one fast weight's state on one rank, all rows of the micro-batch, as it travels."""
    size = 2 if config.parallel.scan_precision is CommPrecision.bf16 else 4
    shard = config.model.hidden_size * config.model.ffn_hidden_size // config.parallel.tp
    return shard * config.train.micro_batch_size * size


def unit_seconds(config: Config, flops: float) -> float:
    """One pass of the local tokens through the layer's down projection."""
    tokens = config.train.seq_length // config.parallel.cp * config.train.micro_batch_size
    width = config.model.ffn_hidden_size / config.parallel.tp
    return 2 * tokens * config.model.hidden_size * width / flops


def plan_rows(
    config: Config, topology: Topology, *, flops: float, ranks: tuple[int, ...] = RANKS
) -> list[PlanRow]:
    """One row per number of ranks. ``flops``: operations per second a device achieves.

    Raises ``ValueError`` where the configuration has no fast weight.
    """
    layers = ttt_layers(config)
    if not layers:
        raise ValueError("ttt.mode = off: there is no fast weight whose state could be scanned")
    order = config.parallel.cp_order
    # Tensor-parallel ranks are neighbours: an island holds fewer ranks of one context group.
    near = replace(topology, island=max(1, topology.island // config.parallel.tp))
    unit = unit_seconds(config, flops)
    half = 0.5 * unit if order is SequenceOrder.zigzag else 0.0
    passes = micro_batches(config, model_parallel_size(config.parallel)) / config.parallel.pp
    rows = []
    for count in ranks:
        size = state_bytes(config)
        predictions = {
            algorithm: predict(algorithm, ranks=count, order=order, state_bytes=size, topology=near)
            for algorithm in ALGORITHMS
        }
        chosen = (
            choose(ranks=count, order=order, state_bytes=size, topology=near)
            if config.parallel.scan is ScanAlgorithm.auto
            else predictions[config.parallel.scan]
        )
        exposed = max(0.0, chosen.seconds - half)
        exposed += max(0.0, chosen.seconds - half - BACKWARD_UNITS * unit)
        sequence = config.train.seq_length // config.parallel.cp * count
        step = exposed * len(layers) * passes
        rows.append(PlanRow(count, sequence, predictions, chosen, exposed, step))
    return rows


def show(config: Config, rows: list[PlanRow], *, flops: float, console: Console) -> None:
    """Print the table of ``tools/plan.py scan``."""
    console.print(
        f"{config.model.name}: {len(ttt_layers(config))} fast weights, a state of "
        f"{state_bytes(config) / 1e6:.1f} MB per rank, "
        f"{config.train.seq_length // config.parallel.cp} tokens per rank, "
        f"one GEMM unit {unit_seconds(config, flops) * 1e3:.2f} ms at {flops / 1e12:g} TFLOP/s"
    )
    table = Table(title="one layer, forward and backward scan; ms unless said")
    headings = ["cp", "tokens", *(a.value for a in ALGORITHMS), "takes", "MB sent", "exposed"]
    for heading in [*headings, "step exposed"]:
        table.add_column(heading, justify="right")
    for row in rows:
        chosen = row.chosen.algorithm.value
        if row.chosen.blocks > 1:
            chosen += f" in {row.chosen.blocks}"
        table.add_row(
            str(row.ranks),
            f"{row.sequence:,}",
            *(f"{2e3 * row.predictions[a].seconds:.2f}" for a in ALGORITHMS),
            chosen,
            f"{row.bytes_sent / 1e6:.0f}",
            f"{row.exposed_s * 1e3:.2f}",
            f"{row.step_exposed_s * 1e3:.1f}",
        )
    console.print(table)


def plot(rows: list[PlanRow], path: Path, *, title: str) -> None:
    """Time against ranks, one line per algorithm and one for what stays exposed, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    ranks = [row.ranks for row in rows]
    for algorithm in ALGORITHMS:
        times = [2e3 * row.predictions[algorithm].seconds for row in rows]
        axes.plot(ranks, times, marker="o", markersize=3, label=algorithm.value)
    exposed = [1e3 * row.exposed_s for row in rows]
    axes.plot(ranks, exposed, color="black", linestyle="--", label="exposed (chosen)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context-parallel ranks")
    axes.set_ylabel("ms per layer, forward and backward")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
