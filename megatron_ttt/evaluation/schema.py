"""The keys of ``tools/evaluate.py`` that all tasks share, and all keys together. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from megatron_ttt.config.bounds import (
    COUNT,
    RANKS,
    RULE_BOUNDS,
    SEED,
    Bound,
    bound_faults,
    flat_values,
)
from megatron_ttt.config.effects import ALWAYS, Condition, Effects
from megatron_ttt.config.faults import Fault
from megatron_ttt.config.load import Root
from megatron_ttt.config.reading import RULE_KEYS, ReadingMode, ReadingRule
from megatron_ttt.config.schema import Bos, Precision
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.evaluation.task import Text, Through
from megatron_ttt.evaluation.tasks import TASKS
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


class DataSplit(Enum):
    """Which documents of an indexed dataset are read; ``all`` for a corpus that is only evaluated.

    The shares are those of ``data.shares``, or of the run that wrote the checkpoint.
    """

    train = "train"
    validation = "validation"
    test = "test"
    all = "all"


class RowKind(Enum):
    """``documents``: every row is the start of one. ``packed``: one after another, as in training.

    Packed, what does not cross a boundary is what did not in the run that wrote the checkpoint.
    """

    documents = "documents"
    packed = "packed"


@dataclass
class EvaluationParallel:
    """The rest of the world is data parallel: documents and samples are dealt to its ranks."""

    tp: int = 1
    cp: int = 1
    cp_order: SequenceOrder = SequenceOrder.zigzag
    scan: ScanAlgorithm = ScanAlgorithm.auto
    timeout_s: int = 1800


@dataclass
class EvaluationData:
    """Held-out text. null everywhere: the validation documents of the checkpoint's own run."""

    path: Any = None  # prefix of .bin/.idx, or text, JSONL and Parquet files; one or a list
    format: InputFormat = InputFormat.auto  # of text files; auto: by suffix and content
    split: DataSplit = DataSplit.validation  # of indexed data; files are read whole
    rows: RowKind = RowKind.documents
    shares: str | None = None  # as data.split of the run; null: the run's
    bos: Bos | None = None  # before a document or prompt; null: as in training, where known
    tokenizer: str | None = None  # bytes, or a folder or hub name; null: the checkpoint's


@dataclass
class EvaluationConfig:
    """The keys of every task; those of one task are in its own dataclass (``tasks/``)."""

    task: Any = MISSING
    checkpoint: str = MISSING  # run folder, checkpoint folder, or hf:FOLDER of an exported model
    output: str | None = None  # folder; null: RUN/evaluation/TASK, or outputs/evaluation/NAME/TASK
    through: Through = Through.megatron  # whose classes run the model
    beyond_positions: bool = False  # read more tokens than the model has positions
    precision: Precision = Precision.auto
    seed: int = 1234  # of generated samples
    ttt: ReadingRule = field(default_factory=ReadingRule)
    parallel: EvaluationParallel = field(default_factory=EvaluationParallel)
    data: EvaluationData = field(default_factory=EvaluationData)


def _whole_schema() -> type[EvaluationConfig]:
    """Return the common keys with a group of keys for each task, named after it."""
    names = Enum("EvaluationTask", {name: name for name in TASKS})  # type: ignore[misc]
    groups = [
        (name, task.settings, field(default_factory=task.settings)) for name, task in TASKS.items()
    ]
    made: list[Any] = [("task", names, MISSING), *groups]
    return make_dataclass("Evaluation", made, bases=(EvaluationConfig,))


EVALUATION_BOUNDS: Mapping[str, Bound] = {
    **RULE_BOUNDS,
    "seed": SEED,
    "parallel.tp": RANKS,
    "parallel.cp": RANKS,
    "parallel.timeout_s": COUNT,
    **{
        f"{name}.{key}": bound for name, task in TASKS.items() for key, bound in task.bounds.items()
    },
}


def evaluation_faults(config: EvaluationConfig) -> list[Fault]:
    """Return what types cannot say, as far as no checkpoint has to be opened for it."""
    faults = bound_faults(config, EVALUATION_BOUNDS)
    # paths of data.path are looked at where they are opened
    faults += [Fault(key, value, "is empty") for key, value in flat_values(config) if value == []]
    if config.through is Through.transformers:
        faults += _served_faults(config)
    return faults


def _served_faults(config: EvaluationConfig) -> Iterator[Fault]:
    """Yield what the classes of exported models cannot do."""
    if config.through not in TASKS[config.task.name].through:
        able = [name for name, task in TASKS.items() if config.through in task.through]
        message = f"only {', '.join(able)} runs through transformers' classes"
        yield Fault("task", config.task, message)
    if config.data.rows is RowKind.packed:
        message = "transformers' classes know no documents inside a row; give documents"
        yield Fault("data.rows", config.data.rows, message)
    for key, size in (("tp", config.parallel.tp), ("cp", config.parallel.cp)):
        if size > 1:
            yield Fault(f"parallel.{key}", size, "transformers' classes run in one process")


def _reads(*texts: Text) -> tuple[Condition, ...]:
    """Return the key has an effect on tasks that read one of ``texts``."""
    return (Condition("task", lambda config: TASKS[config.task.name].text in texts),)


def _is_task(name: str) -> tuple[Condition, ...]:
    return (Condition("task", lambda config: config.task.name == name),)


_CORPUS = _reads(Text.HELD_OUT)
_TOKENIZER = _reads(Text.HELD_OUT, Text.GENERATED)
_FAST = (Condition("ttt.mode", lambda config: config.ttt.mode is not ReadingMode.off),)
_SPREAD = (Condition("parallel.cp", lambda config: config.parallel.cp > 1),)
EVALUATION_EFFECTS: Effects = {
    **dict.fromkeys(
        ("task", "checkpoint", "output", "through", "beyond_positions", "precision"), ALWAYS
    ),
    "seed": _reads(Text.GENERATED),
    "ttt.mode": ALWAYS,
    # reading.py refuses ttt.clip.bound where the checkpoint does not clip
    **dict.fromkeys(RULE_KEYS, _FAST),
    **dict.fromkeys(("parallel.tp", "parallel.cp", "parallel.timeout_s"), ALWAYS),
    "parallel.cp_order": _SPREAD,
    "parallel.scan": _SPREAD + _FAST,
    **{f"data.{key}": _CORPUS for key in ("path", "format", "split", "rows", "shares")},
    **{f"data.{key}": _TOKENIZER for key in ("bos", "tokenizer")},
    **{
        f"{name}.{key.name}": _is_task(name) + task.effects.get(key.name, ())
        for name, task in TASKS.items()
        for key in fields(task.settings)
    },
}

EVALUATION = Root(
    "evaluation",
    _whole_schema(),
    "evaluation_schema",
    grouped=False,
    effects=EVALUATION_EFFECTS,
    faults=evaluation_faults,
    shorts={"ttt": "ttt.mode"},
)
