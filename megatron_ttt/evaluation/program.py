"""From a checked command line to printed tables and written files; read :func:`evaluate` first."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.launcher import launched
from megatron_ttt.conversion.manifest import HF_SCHEME
from megatron_ttt.evaluation.documents import batches, held_out_rows
from megatron_ttt.evaluation.health import run_health
from megatron_ttt.evaluation.needles import run_needles
from megatron_ttt.evaluation.perplexity import resolve_lengths, run_perplexity
from megatron_ttt.evaluation.report import Report, print_report, write_report
from megatron_ttt.evaluation.ruler_task import run_ruler
from megatron_ttt.evaluation.schema import EvaluationConfig, EvaluationTask, evaluation_faults
from megatron_ttt.evaluation.speed import run_speed
from megatron_ttt.evaluation.subject import (
    Reading,
    Source,
    Subject,
    check_reading,
    find_source,
    open_subject,
    row_length,
)
from megatron_ttt.training.run_folder import first_rank_holds

_OUTPUTS = Path("outputs/evaluation")  # of checkpoints that no run wrote


@dataclass(frozen=True)
class Task:
    """One kind of evaluation.

    Attributes:
        reading: how it reads.
        lengths: the rows it reads, in tokens, by the key they come from.
        run: evaluates; called on every rank.
    """

    reading: Reading
    lengths: Callable[[Source, EvaluationConfig], Mapping[str, list[int]]]
    run: Callable[[Subject, EvaluationConfig], Report]


def _perplexity_lengths(source: Source, config: EvaluationConfig) -> dict[str, list[int]]:
    lengths = resolve_lengths(source, config.perplexity)
    return {
        "perplexity.length": [lengths.row],
        "perplexity.contexts": list(lengths.contexts),
    }


def _speed_lengths(source: Source, config: EvaluationConfig) -> dict[str, list[int]]:
    speed = config.speed
    return {"speed.lengths": [length + speed.new_tokens for length in speed.lengths]}


def _health_lengths(source: Source, config: EvaluationConfig) -> dict[str, list[int]]:
    return {"health.length": [row_length(source, config.health.length, key="health.length")]}


def _run_health(subject: Subject, config: EvaluationConfig) -> Report:
    """One row a micro-batch: the gradient holds every activation of what is read at once."""
    (length,) = _health_lengths(subject.source, config)["health.length"]
    text = held_out_rows(subject, config.data, length=length, rows=config.health.rows)
    rows = list(batches(text, subject=subject, batch_size=1))
    report = run_health(subject, rows, config.health)
    report.values["text_sha256"] = text.digest()
    return report


def _ruler_lengths(source: Source, config: EvaluationConfig) -> dict[str, list[int]]:
    return {"ruler.lengths": config.ruler.lengths}


def _needles_lengths(source: Source, config: EvaluationConfig) -> dict[str, list[int]]:
    return {"needles.lengths": config.needles.lengths}


TASKS = {
    EvaluationTask.perplexity: Task(Reading.ROWS, _perplexity_lengths, run_perplexity),
    EvaluationTask.ruler: Task(Reading.SESSION, _ruler_lengths, run_ruler),
    EvaluationTask.needles: Task(Reading.SESSION, _needles_lengths, run_needles),
    EvaluationTask.speed: Task(Reading.SESSION, _speed_lengths, run_speed),
    EvaluationTask.health: Task(Reading.ROWS, _health_lengths, _run_health),
}


def evaluate(config: EvaluationConfig) -> int:
    """Evaluate every checkpoint that ``checkpoint`` names, one after another; the exit status.

    Raises:
        ConfigError: a mistake; nothing has been written for the checkpoint that it concerns.
    """
    faults = evaluation_faults(config)
    if faults:
        raise ConfigError(faults)
    for checkpoint in _checkpoints(config.checkpoint):
        evaluate_checkpoint(checkpoint, config)
    return 0


def evaluate_checkpoint(checkpoint: str, config: EvaluationConfig) -> Report:
    """One checkpoint: checked, loaded, evaluated, printed, written. Called on every rank.

    Returns:
        The report; complete on the first rank.

    Raises:
        ConfigError: see :func:`evaluate`.
    """
    source = find_source(checkpoint)
    task = TASKS[config.task]
    lengths = task.lengths(source, config)
    for key, values in lengths.items():
        for length in values:
            check_reading(
                source,
                config,
                reading=task.reading,
                length=length,
                key=key,
                world_size=launched().world_size,
            )
    longest = max(length for values in lengths.values() for length in values)
    with open_subject(source, config, length=longest) as subject:
        console = Console(quiet=not subject.ranks.is_first)
        console.print(f"{config.task.name} of {source.path}", highlight=False, soft_wrap=True)
        folder, name = output_folder(source, config), file_name(config)
        lock, say = folder / f"{name}.lock", partial(console.print, highlight=False, soft_wrap=True)
        with first_rank_holds(lock, subject.ranks, say, key=("output", str(folder))):
            report = task.run(subject, config)
            print_report(report, console)
            if subject.ranks.is_first:
                about = _about(source, subject, config)
                files = write_report(report, folder, name=name, about=about)
                say(f"wrote {', '.join(str(file) for file in files)}")
    return report


def output_folder(source: Source, config: EvaluationConfig) -> Path:
    """``output`` (below it one folder a checkpoint, if ``checkpoint`` is a pattern).

    Without it ``evaluation`` in the run's folder, or a folder of the checkpoint's name.
    """
    if config.output is not None:
        several = "*" in config.checkpoint
        return Path(config.output) / source.name if several else Path(config.output)
    return source.run / "evaluation" if source.run is not None else _OUTPUTS / source.name


def file_name(config: EvaluationConfig) -> str:
    """The task, and what was changed of the checkpoint's own update rule."""
    rule = asdict(config.ttt)
    changed = {name: rule[name] for name in ("eta", "chunk_size", "decay")}
    changed |= {f"clip.{name}": value for name, value in rule["clip"].items()}
    parts = [f"ttt.{name}={show(value)}" for name, value in changed.items() if value is not None]
    return ",".join([config.task.name, *parts])


def _checkpoints(pattern: str) -> list[str]:
    """The checkpoint named, or every folder that a pattern with ``*`` matches."""
    if "*" not in pattern or pattern.startswith(HF_SCHEME):
        return [pattern]
    found = sorted(match for match in glob.glob(pattern) if Path(match).is_dir())
    if not found:
        raise ConfigError([Fault("checkpoint", pattern, "no folder has such a name")])
    return found


def _about(source: Source, subject: Subject, config: EvaluationConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    rule = OmegaConf.to_container(OmegaConf.structured(subject.config.ttt), enum_to_str=True)
    return {
        "task": config.task.name,
        "checkpoint": str(source.path),
        "name": source.name,
        "evaluation": plain,
        "ttt": rule,
        "trained": source.trained,
        "ranks": subject.ranks.world_size,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
