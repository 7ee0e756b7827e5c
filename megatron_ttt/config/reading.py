"""How a trained checkpoint is read: its own update rule, or a changed one. No torch.

The update rule of a checkpoint is part of what was trained; reading it under another one is how
its choice is examined (ablations) and how a bad one is tamed (``decay``, ``clip``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from megatron_ttt.config.bounds import RULE_BOUNDS
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import (
    AttentionBackend,
    Boundaries,
    ComputeConfig,
    ModelConfig,
    ParallelConfig,
    PassConfig,
    Toggle,
    TTTConfig,
    TTTMode,
)
from megatron_ttt.rule import Clip, ClipMode


class ReadingMode(Enum):
    """Which of a checkpoint's two readings are wanted; ``both`` compares them."""

    both = "both"
    in_place = "in_place"
    off = "off"


@dataclass
class ClipChanges:
    """Keys ``ttt.clip.*``; null: as the checkpoint says."""

    mode: ClipMode | None = None
    bound: float | None = None  # of what a chunk writes, over norm(W0) or absolute


@dataclass
class ReadingRule:
    """Keys ``ttt.*`` of a program that reads a checkpoint; null: as the checkpoint says."""

    mode: ReadingMode = ReadingMode.both  # both: as trained, and off where a program compares
    eta: float | None = None  # null, here and below: as the checkpoint says
    chunk_size: int | None = None  # tokens
    decay: float | None = None  # per chunk; 1 keeps everything
    clip: ClipChanges = field(default_factory=ClipChanges)


# The keys of an update rule that a reading may change.
RULE_KEYS = ("ttt.eta", "ttt.chunk_size", "ttt.decay", "ttt.clip.mode", "ttt.clip.bound")


def changed_rule(ttt: TTTConfig, rule: ReadingRule) -> TTTConfig:
    """Return the checkpoint's update rule with the keys of ``rule`` that are set."""
    clip = Clip(
        mode=ttt.clip.mode if rule.clip.mode is None else rule.clip.mode,
        bound=ttt.clip.bound if rule.clip.bound is None else rule.clip.bound,
    )
    changes = {
        name: value
        for name in ("eta", "chunk_size", "decay")
        if (value := getattr(rule, name)) is not None
    }
    return replace(ttt, clip=clip, **changes)


def fitting_rule(ttt: TTTConfig, rule: ReadingRule) -> TTTConfig:
    """``changed_rule``, once the keys of ``rule`` are known to mean something for the checkpoint.

    Raises:
        ConfigError: an impossible value, a change of fast weights that the checkpoint does not
            have, or the bound of a clip that is off.
    """
    faults = list(rule_faults(rule))
    if ttt.mode is TTTMode.off:
        message = "the checkpoint has no fast weights"
        faults += [Fault(key, value, message) for key, value in set_keys(rule)]
        if rule.mode is ReadingMode.in_place:
            faults.append(Fault("ttt.mode", rule.mode, message))
    changed = changed_rule(ttt, rule)
    if not faults and rule.clip.bound is not None and changed.clip.mode is ClipMode.off:
        message = "the checkpoint has ttt.clip.mode=off; give relative or absolute beside the bound"
        faults.append(Fault("ttt.clip.bound", rule.clip.bound, message))
    if faults:
        raise ConfigError(faults)
    return changed


def set_keys(rule: ReadingRule) -> Iterator[tuple[str, Any]]:
    """Yield the keys that differ from the checkpoint's, ``mode`` apart."""
    values = {
        "ttt.eta": rule.eta,
        "ttt.chunk_size": rule.chunk_size,
        "ttt.decay": rule.decay,
        "ttt.clip.mode": rule.clip.mode,
        "ttt.clip.bound": rule.clip.bound,
    }
    return ((key, value) for key, value in values.items() if value is not None)


def modes(ttt: TTTConfig, mode: ReadingMode) -> list[TTTMode]:
    """Return the readings that are asked for, fast weights first.

    A checkpoint without fast weights has one reading: ``both`` is then ``off``.
    """
    if ttt.mode is TTTMode.off or mode is ReadingMode.off:
        return [TTTMode.off]
    return [TTTMode.in_place] if mode is ReadingMode.in_place else [TTTMode.in_place, TTTMode.off]


def rule_faults(rule: ReadingRule) -> Iterator[Fault]:
    """Yield what no update rule may be; whether it fits the checkpoint is not asked here."""
    for key, value in set_keys(rule):
        complaint = RULE_BOUNDS[key].complaint(value) if key in RULE_BOUNDS else None
        if complaint is not None:  # nan is of no size
            said = complaint.replace("must be at least", "must be a number of at least")
            yield Fault(key, value, said if value != value else complaint)


def reading_config(
    model: ModelConfig,
    ttt: TTTConfig,
    *,
    train: PassConfig,
    data: Boundaries | None = None,
    parallel: ParallelConfig | None = None,
) -> ComputeConfig:
    """Return what Megatron and the layouts of rows are configured from where nothing is trained.

    Reading needs attention on any device (torch's) and no sequence parallelism.

    Args:
        model, ttt: the checkpoint's; the rule may be a changed one.
        train: ``seq_length`` (tokens of the longest row), precision, seed.
        data: what a document boundary does.
        parallel: the ranks that read.
    """
    return ComputeConfig(
        model=replace(model, attention=AttentionBackend.torch),
        ttt=ttt,
        data=data or Boundaries(),
        parallel=replace(parallel or ParallelConfig(), sequence_parallel=Toggle.off),
        train=train,
    )
