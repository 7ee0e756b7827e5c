"""From a checked command line to printed tables and written files; read :func:`evaluate` first."""

from __future__ import annotations

import glob
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from megatron_ttt.config.derived import unread_writes
from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.launcher import launched
from megatron_ttt.config.schema import HF_SCHEME, TTTMode
from megatron_ttt.conversion.opened import Checkpoint, open_checkpoint
from megatron_ttt.evaluation.report import Report, print_report, write_report
from megatron_ttt.evaluation.schema import EvaluationConfig, evaluation_faults
from megatron_ttt.evaluation.subject import (
    Subject,
    check_reading,
    open_subject,
)
from megatron_ttt.evaluation.tasks import TASKS
from megatron_ttt.training.run_folder import first_rank_holds

_OUTPUTS = Path("outputs/evaluation")  # of checkpoints that no run wrote


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
    source = open_checkpoint(checkpoint)
    task = TASKS[config.task.name]
    settings = task.settings_of(config, config.task.name)
    lengths = task.lengths(source, settings)
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
        notice = unread_writes(subject.config)
        if notice is not None and TTTMode.in_place in subject.modes:
            console.print(notice, highlight=False, soft_wrap=True)
        folder, name = output_folder(source, config), file_name(config)
        lock, say = folder / f"{name}.lock", partial(console.print, highlight=False, soft_wrap=True)
        with first_rank_holds(lock, subject.ranks, say, key=("output", str(folder))):
            report = task.run(subject, settings, config)
            print_report(report, console)
            if subject.ranks.is_first:
                about = _about(source, subject, config)
                files = write_report(report, folder, name=name, about=about)
                say(f"wrote {', '.join(str(file) for file in files)}")
    return report


def output_folder(source: Checkpoint, config: EvaluationConfig) -> Path:
    """``output`` (below it one folder a checkpoint, if ``checkpoint`` is a pattern).

    Without it ``evaluation`` in the run's folder, or a folder of the checkpoint's name.
    """
    if config.output is not None:
        several = "*" in config.checkpoint
        return Path(config.output) / source.name if several else Path(config.output)
    return source.run / "evaluation" if source.run is not None else _OUTPUTS / source.name


def file_name(config: EvaluationConfig) -> str:
    """Return the task, and what was changed of the checkpoint's own update rule."""
    rule = asdict(config.ttt)
    changed = {name: rule[name] for name in ("eta", "chunk_size", "decay")}
    changed |= {f"clip.{name}": value for name, value in rule["clip"].items()}
    parts = [f"ttt.{name}={show(value)}" for name, value in changed.items() if value is not None]
    return ",".join([config.task.name, *parts])


def _checkpoints(pattern: str) -> list[str]:
    """Return the checkpoint named, or every folder that a pattern with ``*`` matches."""
    if "*" not in pattern or pattern.startswith(HF_SCHEME):
        return [pattern]
    found = sorted(match for match in glob.glob(pattern) if Path(match).is_dir())
    if not found:
        raise ConfigError([Fault("checkpoint", pattern, "no folder has such a name")])
    return found


def _about(source: Checkpoint, subject: Subject, config: EvaluationConfig) -> dict[str, Any]:
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
