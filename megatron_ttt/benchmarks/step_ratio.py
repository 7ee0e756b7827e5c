"""A training step with fast weights on and off, in alternating rounds.

Both models train: forward, backward and optimizer, through the code that trains, on the same random
tokens, with random weights. Seconds are CPU time of the process on a CPU and elapsed time on a GPU.
The ratio of operations (``config/flops.py``) stands beside the ratio of times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from rich.console import Console

from megatron_ttt.config.flops import training_flops_per_token
from megatron_ttt.config.schema import Config
from megatron_ttt.data.rows import Batch, make_batch
from megatron_ttt.model.initialize import Origin
from megatron_ttt.training.distributed import Ranks, distributed
from megatron_ttt.training.loop import Trainer, build_trainer


@dataclass(frozen=True)
class StepRatio:
    """Every round's seconds, and the ratio of operations."""

    on: list[float]
    off: list[float]
    operations: float

    @property
    def ratios(self) -> list[float]:
        """On over off, round by round."""
        return [one / other for one, other in zip(self.on, self.off, strict=True)]


def measure(on: Config, off: Config, *, rounds: int) -> StepRatio:
    """Train both, one step each in every round; the first round does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with distributed(on) as ranks:
        trainers = [random_trainer(config, ranks) for config in (on, off)]
        batch = rows_of(on)
        clock = time.perf_counter if ranks.device.type == "cuda" else time.process_time
        for _ in range(rounds + 1):
            for own, trainer in zip(seconds, trainers, strict=True):
                begin = clock()
                trainer.train_step(repeat(batch), wants_norms=False)
                own.append(clock() - begin)
    operations = training_flops_per_token(on) / training_flops_per_token(off)
    return StepRatio(seconds[0][1:], seconds[1][1:], operations)


def random_trainer(config: Config, ranks: Ranks) -> Trainer:
    """Return a trainer of random weights, drawn on the device: drawing 4B on a CPU takes long."""
    trainer = build_trainer(config, ranks, Origin.LOADED)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.normal_(std=0.02)
    trainer.optimizer.reload_model_params()
    return trainer


def rows_of(config: Config, documents: int = 1) -> Batch:
    """Return a micro-batch of random tokens in equally long documents."""
    generator = torch.Generator().manual_seed(config.train.seed)
    rows, length = config.train.micro_batch_size, config.train.seq_length
    eod = config.model.vocab_size - 1
    text_BR = torch.randint(0, eod, (rows, length + 1), generator=generator)
    text_BR[:, length // documents - 1 : -1 : length // documents] = eod
    return make_batch(text_BR, range(rows), eod=eod, pad=None)


def report(config: Config, found: StepRatio, console: Console) -> None:
    """Print times, their ratio, and that of operations."""
    train, ratios = config.train, found.ratios
    console.print(
        f"{config.model.name}: {train.micro_batch_size} x {train.seq_length} tokens, chunks of"
        f" {config.ttt.chunk_size}, {torch.get_num_threads()} thread(s), {len(ratios)} rounds",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"on {statistics.median(found.on) * 1e3:.0f} ms, off"
        f" {statistics.median(found.off) * 1e3:.0f} ms: {statistics.median(ratios):.3f}"
        f" ({min(ratios):.3f} to {max(ratios):.3f}); by operations {found.operations:.3f}",
        highlight=False,
        soft_wrap=True,
    )


def as_record(found: StepRatio, words: Sequence[str]) -> dict[str, Any]:
    """Return every number, for a file."""
    return {"overrides": list(words), **asdict(found)}
