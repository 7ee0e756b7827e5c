"""What a run reports: ``metrics.jsonl``, the terminal, TensorBoard, wandb, a plot."""

import json
import os
import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import Config, LoggingConfig, WandbMode

Row = dict[str, float | int]


class MetricsFile:
    """``metrics.jsonl``: one object a step, in order, cut back on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_to(self, size: int) -> None:
        """Drop the rows that a checkpoint of this file length did not know of.

        Raises:
            ValueError: the file is shorter than the checkpoint says.
        """
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < size:
            raise ValueError(f"{self.path} has {present} bytes, its checkpoint was saved at {size}")
        if self.path.exists():
            os.truncate(self.path, size)

    def append(self, row: Row) -> None:
        """Add one step."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def size(self) -> int:
        """Bytes so far, stored in checkpoints."""
        return self.path.stat().st_size if self.path.exists() else 0


class Sink(Protocol):
    """Somewhere that rows go."""

    def write(self, row: Row) -> None:
        """Take one step's row."""

    def close(self) -> None:
        """Flush and finish."""


class Terminal:
    """One line per ``logging.interval`` steps, and a progress bar where a person is watching."""

    def __init__(self, console: Console, *, steps: int, done: int, interval: int) -> None:
        self.console, self.steps, self.interval = console, steps, interval
        self._started, self._first = time.monotonic(), done
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done)
            self._bar.start()

    def write(self, row: Row) -> None:
        """Print the row when its turn has come."""
        step = int(row["step"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.interval == 0 or step in (self._first + 1, self.steps):
            self.console.print(self._line(row), highlight=False, soft_wrap=True)
        if "validation/loss" in row:
            self.console.print(_validation_line(row), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, row: Row) -> str:
        step = int(row["step"])
        seconds = (time.monotonic() - self._started) / (step - self._first) * (self.steps - step)
        ratios = [value for key, value in row.items() if key.startswith("ttt/update_ratio")]
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {row['loss']:.4f}",
            f"grad norm {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if ratios:
            parts.append(f"update ratio {_ratio(max(ratios))}")
        return "  ".join([*parts, f"left {_duration(seconds)}"])


def _ratio(value: float) -> str:
    """Return three decimals, or two digits where these would be lost."""
    return f"{value:.3f}" if value == 0 or value >= 0.01 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    """Return ``m:ss``, ``h:mm:ss`` from an hour on, with days in front from a day on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{rest:02d}"
    clock = f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{days} d {clock}" if days else clock


def _validation_line(row: Row) -> str:
    line = f"[bold]validation loss {row['validation/loss']:.4f}[/bold]"
    if "validation/loss_ttt_off" in row:
        line += f"  with fast weights off {row['validation/loss_ttt_off']:.4f}"
    return line


class TensorBoard:
    """Scalars under their metric names in ``<run.dir>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, row: Row) -> None:
        """Add every metric at the row's step."""
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class Wandb:
    """A wandb run named as ours, resumed under an id kept in the run's folder."""

    def __init__(self, folder: Path, logging: LoggingConfig, config: dict[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                entity=logging.wandb_entity,
                name=config["run"]["name"],
                id=id_file.read_text(),
                resume="allow",
                mode=logging.wandb.value,
                dir=str(folder),
                config=config,
            )
        except wandb.Error as error:  # not logged in, no such project, no network
            reason = str(error).strip().splitlines()[0]
            raise ConfigError([Fault("logging.wandb", logging.wandb, reason)]) from error

    def write(self, row: Row) -> None:
        """Log the row at its step."""
        self._run.log({key: value for key, value in row.items() if key != "step"}, int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Reporter:
    """Hands every row to the file and to all sinks; exists on one rank only."""

    def __init__(
        self, config: Config, as_dict: dict[str, Any], console: Console, *, done: int
    ) -> None:
        folder = Path(config.run.dir)
        self.file = MetricsFile(folder / "metrics.jsonl")
        logging = config.logging
        self._sinks: list[Sink] = [
            Terminal(console, steps=config.train.steps, done=done, interval=logging.interval)
        ]
        if logging.tensorboard:
            self._sinks.append(TensorBoard(folder / "tensorboard"))
        if logging.wandb is not WandbMode.disabled:
            self._sinks.append(Wandb(folder, logging, as_dict))

    def write(self, row: Row) -> None:
        """Report one step."""
        self.file.append(row)
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Close every sink, also when one of them fails."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_loss(rows: list[Row], path: Path, *, title: str) -> None:
    """Draw training loss, smoothed loss and validation losses over steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    smooth, total, weight = [], 0.0, 0.0
    for loss in losses:  # the recent past, each step back counting a tenth less
        total, weight = 0.9 * total + loss, 0.9 * weight + 1
        smooth.append(total / weight)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(steps, smooth, color="#08519c", linewidth=1.8, label="training, smoothed")
    for key, label, colour in (
        ("validation/loss", "validation", "#d95f02"),
        ("validation/loss_ttt_off", "validation, fast weights off", "#7f7f7f"),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label
            )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
