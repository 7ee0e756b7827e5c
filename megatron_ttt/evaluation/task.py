"""What a task of ``tools/evaluate.py`` tells the harness about itself. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megatron_ttt.config.bounds import Bound
from megatron_ttt.config.effects import Condition
from megatron_ttt.config.faults import ConfigError, Fault

if TYPE_CHECKING:
    from megatron_ttt.conversion.opened import Checkpoint
    from megatron_ttt.evaluation.report import Report
    from megatron_ttt.evaluation.schema import EvaluationConfig
    from megatron_ttt.evaluation.subject import Subject

Settings = TypeVar("Settings")


class Reading(Enum):
    """How a task reads, which decides how long its rows may be across context-parallel ranks.

    ``ROWS``: whole rows as in training; spans have to hold whole chunks. ``SESSION``: prompts,
    of any length.
    """

    ROWS = "rows"
    SESSION = "session"


class Text(Enum):
    """Where a task's text comes from, which decides which common keys it reads.

    ``HELD_OUT``: ``data.*``. ``GENERATED``: ``seed`` and the tokenizer. ``RANDOM``: tokens without
    a text.
    """

    HELD_OUT = "held out"
    GENERATED = "generated"
    RANDOM = "random"


class Through(Enum):
    """Whose classes run the model; ``transformers``: those that serve exported models."""

    megatron = "megatron"
    transformers = "transformers"


@dataclass(frozen=True)
class Task(Generic[Settings]):
    """One kind of evaluation; its name is that of its module in ``tasks/``.

    Attributes:
        settings: the dataclass of the keys ``NAME.*``.
        reading: how it reads.
        text: what it reads.
        lengths: the rows it reads, in tokens, by the dotted key they come from.
        run: evaluates; called on every rank, its report complete on the first.
        bounds: of the numbers of ``settings``.
        effects: conditions of keys of ``settings``, besides the task itself.
        through: whose classes can run the model for it.
    """

    settings: type[Settings]
    reading: Reading
    text: Text
    lengths: Callable[[Checkpoint, Settings], Mapping[str, list[int]]]
    run: Callable[[Subject, Settings, EvaluationConfig], Report]
    bounds: Mapping[str, Bound]
    effects: Mapping[str, tuple[Condition, ...]] = field(default_factory=dict)
    through: frozenset[Through] = frozenset({Through.megatron})

    def settings_of(self, config: EvaluationConfig, name: str) -> Settings:
        """Return the task's own keys in a whole configuration."""
        found: Any = getattr(config, name)
        assert isinstance(found, self.settings)
        return found


def row_length(source: Checkpoint, length: int | None, *, key: str) -> int:
    """Return ``length``, or the row length of the run that wrote the checkpoint.

    Raises:
        ConfigError: neither is known; ``key`` is the one to set.
    """
    if length is not None:
        return length
    trained: int | None = source.trained.get("train", {}).get("seq_length")
    if trained is None:
        message = f"{source.path} was trained at no known length: give one"
        raise ConfigError([Fault(key, None, message)])
    return trained
