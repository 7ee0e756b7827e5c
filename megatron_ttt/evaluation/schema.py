"""The keys of ``tools/evaluate.py``: one owner for each, its type and its default. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from megatron_ttt.config.reading import ReadingMode, ReadingRule
from megatron_ttt.config.schema import Bos, Precision
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


class EvaluationTask(Enum):
    perplexity = "perplexity"
    ruler = "ruler"
    needles = "needles"
    speed = "speed"
    health = "health"


class RulerTask(Enum):
    """The kinds of RULER (arXiv 2404.06654), generated offline."""

    niah_single = "niah_single"
    niah_multikey = "niah_multikey"
    niah_multivalue = "niah_multivalue"
    niah_multiquery = "niah_multiquery"
    variable_tracking = "variable_tracking"
    common_words = "common_words"
    frequent_words = "frequent_words"
    question_answering = "question_answering"


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
class PerplexityConfig:
    """Loss by position, and by the length of the context before the same scored tokens."""

    length: int | None = None  # tokens of a row; null: the length the checkpoint was trained at
    rows: int = 64
    batch_size: int = 4
    bins: int = 16  # positions are averaged over length/bins tokens
    contexts: list[int] | None = None  # context lengths to compare; null: length, /2, /4, ...
    scored: int | None = None  # last tokens of a row that every context length predicts


@dataclass
class RulerConfig:
    tasks: list[RulerTask] | None = None  # null: all
    lengths: list[int] = field(default_factory=lambda: [4096])  # tokens, answer included
    samples: int = 20  # per task and length
    haystack: str | None = None  # text file to hide needles in; null: repeated noise
    batch_size: int = 1


@dataclass
class NeedlesConfig:
    """One needle at every depth and length."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    depths: int = 11  # evenly from 0 (the start) to 1 (the end)
    samples: int = 5  # per cell
    haystack: str | None = None
    batch_size: int = 1


@dataclass
class SpeedConfig:
    lengths: list[int] = field(default_factory=lambda: [1024, 4096])  # tokens of the prompt
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    new_tokens: int = 64
    repeats: int = 5


@dataclass
class HealthConfig:
    length: int | None = None  # tokens of a row; null: the length the checkpoint was trained at
    rows: int = 8
    positions: int = 8  # places along the row that are reported


@dataclass
class EvaluationConfig:
    task: EvaluationTask = MISSING
    checkpoint: str = MISSING  # run folder, checkpoint folder, or hf:FOLDER of an exported model
    output: str | None = None  # folder; null: RUN/evaluation/TASK, or outputs/evaluation/NAME/TASK
    beyond_positions: bool = False  # read more tokens than the model has positions
    precision: Precision = Precision.auto
    seed: int = 1234  # of generated samples
    ttt: ReadingRule = field(default_factory=ReadingRule)
    parallel: EvaluationParallel = field(default_factory=EvaluationParallel)
    data: EvaluationData = field(default_factory=EvaluationData)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    ruler: RulerConfig = field(default_factory=RulerConfig)
    needles: NeedlesConfig = field(default_factory=NeedlesConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    health: HealthConfig = field(default_factory=HealthConfig)


EVALUATION_BOUNDS: Mapping[str, Bound] = {
    **RULE_BOUNDS,
    "seed": SEED,
    "parallel.tp": RANKS,
    "parallel.cp": RANKS,
    "parallel.timeout_s": COUNT,
    "perplexity.length": COUNT,
    "perplexity.rows": COUNT,
    "perplexity.batch_size": COUNT,
    "perplexity.bins": COUNT,
    "perplexity.contexts": COUNT,
    "perplexity.scored": COUNT,
    "ruler.lengths": COUNT,
    "ruler.samples": COUNT,
    "ruler.batch_size": COUNT,
    "needles.lengths": COUNT,
    "needles.depths": COUNT,
    "needles.samples": COUNT,
    "needles.batch_size": COUNT,
    "speed.lengths": COUNT,
    "speed.batch_sizes": COUNT,
    "speed.new_tokens": COUNT,
    "speed.repeats": COUNT,
    "health.length": COUNT,
    "health.rows": COUNT,
    "health.positions": COUNT,
}


def evaluation_faults(config: EvaluationConfig) -> list[Fault]:
    """What types cannot say, as far as no checkpoint has to be opened for it."""
    faults = bound_faults(config, EVALUATION_BOUNDS)
    # paths of data.path are looked at where they are opened
    faults += [Fault(key, value, "is empty") for key, value in flat_values(config) if value == []]
    return faults


def _task_reads(*tasks: EvaluationTask) -> tuple[Condition, ...]:
    return (Condition("task", lambda config: config.task in tasks),)


def _hides_needles(config: EvaluationConfig) -> bool:
    tasks = list(RulerTask) if config.ruler.tasks is None else config.ruler.tasks
    return any(task.name.startswith("niah") for task in tasks)


_ROWS = _task_reads(EvaluationTask.perplexity, EvaluationTask.health)  # tasks that read a corpus
_ASKED = _task_reads(EvaluationTask.ruler, EvaluationTask.needles)  # tasks that make their texts
_FAST = (Condition("ttt.mode", lambda config: config.ttt.mode is not ReadingMode.off),)
_SPREAD = (Condition("parallel.cp", lambda config: config.parallel.cp > 1),)
_PERPLEXITY, _RULER, _NEEDLES, _SPEED, _HEALTH = (
    _task_reads(task)
    for task in (
        EvaluationTask.perplexity,
        EvaluationTask.ruler,
        EvaluationTask.needles,
        EvaluationTask.speed,
        EvaluationTask.health,
    )
)
EVALUATION_EFFECTS: Effects = {
    "task": ALWAYS,
    "checkpoint": ALWAYS,
    "output": ALWAYS,
    "beyond_positions": ALWAYS,
    "precision": ALWAYS,
    "seed": _ASKED,
    "ttt.mode": ALWAYS,
    "ttt.eta": _FAST,
    "ttt.chunk_size": _FAST,
    "ttt.decay": _FAST,
    "ttt.clip.mode": _FAST,
    "ttt.clip.bound": _FAST,  # reading.py refuses it where the checkpoint does not clip
    "parallel.tp": ALWAYS,
    "parallel.cp": ALWAYS,
    "parallel.cp_order": _SPREAD,
    "parallel.scan": _SPREAD + _FAST,
    "parallel.timeout_s": ALWAYS,
    "data.path": _ROWS,
    "data.format": _ROWS,
    "data.split": _ROWS,
    "data.rows": _ROWS,
    "data.shares": _ROWS,
    "data.bos": _task_reads(*(task for task in EvaluationTask if task.name != "speed")),
    "data.tokenizer": _task_reads(*(task for task in EvaluationTask if task.name != "speed")),
    "perplexity.length": _PERPLEXITY,
    "perplexity.rows": _PERPLEXITY,
    "perplexity.batch_size": _PERPLEXITY,
    "perplexity.bins": _PERPLEXITY,
    "perplexity.contexts": _PERPLEXITY,
    "perplexity.scored": _PERPLEXITY,
    "ruler.tasks": _RULER,
    "ruler.lengths": _RULER,
    "ruler.samples": _RULER,
    "ruler.haystack": (*_RULER, Condition("ruler.tasks", _hides_needles)),
    "ruler.batch_size": _RULER,
    "needles.lengths": _NEEDLES,
    "needles.depths": _NEEDLES,
    "needles.samples": _NEEDLES,
    "needles.haystack": _NEEDLES,
    "needles.batch_size": _NEEDLES,
    "speed.lengths": _SPEED,
    "speed.batch_sizes": _SPEED,
    "speed.new_tokens": _SPEED,
    "speed.repeats": _SPEED,
    "health.length": _HEALTH,
    "health.rows": _HEALTH,
    "health.positions": _HEALTH,
}

EVALUATION = Root(
    "evaluation",
    EvaluationConfig,
    "evaluation_schema",
    grouped=False,
    effects=EVALUATION_EFFECTS,
    faults=evaluation_faults,
)
