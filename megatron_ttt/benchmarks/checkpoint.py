"""How long a training step waits for a checkpoint: asynchronous against synchronous, in one run.

One model is trained on random tokens; its checkpoints are saved in turn in both modes. *Stall* is
the time that the call of the saver keeps the training loop; *published* the time until the
checkpoint is complete and visible; *step* a training step meanwhile (the median of all that fall
into that time), beside one when nothing is being saved.

Shape letters: B rows of a micro-batch, T tokens.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_ttt.checkpoints.manifest import read_manifest
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.checkpoints.run_files import step_folder
from megatron_ttt.config.load import load_config
from megatron_ttt.config.schema import Config
from megatron_ttt.data.batches import Batch, make_batch
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, Retention, SaveMode
from megatron_ttt.training.distributed import distributed
from megatron_ttt.training.loop import Trainer, build_trainer


@dataclass(frozen=True)
class SaveProblem:
    """What is saved, where, and how often.

    Attributes:
        hidden: of the model; ffn is three times that.
        folder: on the file system to be measured; ``None`` is the system's temporary folder.
        repeats: saves in each mode.
    """

    hidden: int = 512
    layers: int = 8
    repeats: int = 3
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.hidden % 64:
            raise ValueError(f"hidden={self.hidden}: must be a multiple of 64")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"folder={self.folder}: is not a folder")

    def config(self) -> Config:
        """Return a model of these sizes over bytes, as the tiny one trains it."""
        return load_config(
            [
                "+model=tiny",
                f"model.hidden_size={self.hidden}",
                f"model.ffn_hidden_size={3 * self.hidden}",
                f"model.layers={self.layers}",
                f"model.heads={self.hidden // 64}",
                f"model.kv_groups={self.hidden // 64}",
                "ttt.layers=[0]",
                "train.seq_length=256",
                "train.micro_batch_size=1",
                "train.global_batch_size=1",
            ]
        )


@dataclass(frozen=True)
class SaveMeasurement:
    """Medians over the saves in one mode, in seconds.

    Attributes:
        step_s: a training step between the call and the publication; ``None`` when none fell there.
    """

    mode: str
    stall_s: float
    published_s: float
    step_s: float | None


@dataclass(frozen=True)
class SaveReport:
    """The measurements, the undisturbed step, and the size of one checkpoint."""

    measurements: list[SaveMeasurement]
    step_s: float
    checkpoint_bytes: int


def measure(problem: SaveProblem) -> SaveReport:
    """Train and save in one process.

    Raises:
        SaveFailed: the folder cannot take the checkpoints.
    """
    config = problem.config()
    with (
        tempfile.TemporaryDirectory(dir=problem.folder) as folder,
        distributed(config) as ranks,
    ):
        trainer = build_trainer(config, ranks)
        data = random_rows(config)
        one_step(trainer, data)  # warm-up: the first step's allocations are not measured
        plain = [one_step(trainer, data) for _ in range(5)]
        root = Path(folder) / "checkpoints"
        savers = {mode: build_saver(root, trainer, mode) for mode in SaveMode}
        for number, saver in enumerate(savers.values()):  # as are those of the first save
            timed_save(saver, trainer, data, number + 1)
        step, rounds = len(savers), []
        for _ in range(problem.repeats):
            for mode, saver in savers.items():
                step += 1
                rounds.append((mode, *timed_save(saver, trainer, data, step)))
        files = read_manifest(step_folder(root, step)).files
    return SaveReport(
        [summary(mode, rounds) for mode in SaveMode],
        statistics.median(plain),
        sum(record.bytes for record in files.values()),
    )


def build_saver(root: Path, trainer: Trainer, mode: SaveMode) -> CheckpointSaver:
    """Return a saver that is quiet and keeps one checkpoint."""
    return CheckpointSaver(
        root,
        trainer.state,
        ranks=trainer.ranks,
        mode=mode,
        facts={},
        retention=Retention(last=1),
        report=lambda _: None,
    )


def timed_save(
    saver: CheckpointSaver, trainer: Trainer, data: Iterator[Batch], step: int
) -> tuple[float, float, list[float]]:
    """(stall, time until published, training steps meanwhile), in seconds."""
    final = step_folder(saver.root, step)
    began = time.perf_counter()
    saver.save(Progress(step, step, 256 * step, 0))
    stall = time.perf_counter() - began
    steps: list[float] = []
    while not final.exists():
        steps.append(one_step(trainer, data))
        saver.poll()
    return stall, time.perf_counter() - began, steps


def one_step(trainer: Trainer, data: Iterator[Batch]) -> float:
    """Seconds of a training step, until the device is done."""
    began = time.perf_counter()
    trainer.train_step(data)
    if trainer.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def random_rows(config: Config) -> Iterator[Batch]:
    """Micro-batches of one document each, without end."""
    generator = torch.Generator().manual_seed(config.train.seed)
    length = config.train.seq_length
    while True:
        text_BT = torch.randint(0, 256, (1, length + 1), generator=generator)
        yield make_batch(text_BT, [0], eod=256, pad=257)


def summary(
    mode: SaveMode, rounds: list[tuple[SaveMode, float, float, list[float]]]
) -> SaveMeasurement:
    """Return the medians of one mode."""
    mine = [(stall, published, steps) for name, stall, published, steps in rounds if name is mode]
    meanwhile = [seconds for _, _, steps in mine for seconds in steps]
    return SaveMeasurement(
        mode.value,
        statistics.median(stall for stall, _, _ in mine),
        statistics.median(published for _, published, _ in mine),
        statistics.median(meanwhile) if meanwhile else None,
    )


def as_record(problem: SaveProblem, report: SaveReport) -> dict[str, Any]:
    """Every number, for a file."""
    settings = {
        **asdict(problem),
        "folder": None if problem.folder is None else str(problem.folder),
    }
    return {"problem": settings, **asdict(report)}


def show(problem: SaveProblem, report: SaveReport, console: Console) -> None:
    """Print the table."""
    size = f"{report.checkpoint_bytes / 1e6:.0f} MB"
    table = Table(title=f"hidden {problem.hidden}, {problem.layers} layers, {size} a checkpoint")
    for heading in ("saving", "stall", "published after", "step meanwhile", "step otherwise"):
        table.add_column(heading, justify="left" if heading == "saving" else "right")
    for row in report.measurements:
        meanwhile = "" if row.step_s is None else f"{1e3 * row.step_s:.0f} ms"
        table.add_row(
            row.mode,
            f"{1e3 * row.stall_s:.0f} ms",
            f"{1e3 * row.published_s:.0f} ms",
            meanwhile,
            f"{1e3 * report.step_s:.0f} ms",
        )
    console.print(table)
    stalls = {row.mode: row.stall_s for row in report.measurements}
    ratio = stalls[SaveMode.SYNCHRONOUS.value] / stalls[SaveMode.ASYNCHRONOUS.value]
    console.print(f"an asynchronous save keeps the step {ratio:.1f} times shorter")
