"""Which keys have no effect under another key's value, as a table; what a user is told then.

A default that has no effect is harmless, and so is what a recipe of ``configs/`` sets. A value that
the *user* gave and that nothing reads is named in one line, or refused where a run would silently
be another one than was asked for.
"""

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_ttt.config import derived
from megatron_ttt.config.bounds import flat_values
from megatron_ttt.config.faults import Fault, show
from megatron_ttt.config.schema import (
    AttentionBackend,
    Config,
    DataSource,
    Recompute,
    RopeScaling,
    Schedule,
    TokenizerKind,
    TTTMode,
    WandbMode,
)
from megatron_ttt.rule import ClipMode, WriteKind
from megatron_ttt.scan_words import ScanAlgorithm


class Else(Enum):
    """What follows where a key that the user gave has no effect."""

    NOTICE = "notice"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Condition:
    """Under which values of another key a key has an effect.

    Attributes:
        key: the other one; named in the sentence with its value.
        acts: whether the key has an effect.
        otherwise: what follows where it has none.
        advice: behind the sentence.
    """

    key: str
    acts: Callable[[Any], bool]
    otherwise: Else = Else.NOTICE
    advice: str = ""


# A key's conditions; it acts where all of them hold. No conditions: it always acts.
Effects = Mapping[str, tuple[Condition, ...]]
ALWAYS: tuple[Condition, ...] = ()


def idle_keys(
    config: Any, effects: Effects, given: Collection[str]
) -> Iterator[tuple[str, Any, Condition]]:
    """Yield given keys without effect: key, value, the first condition that does not hold.

    Args:
        config: of a schema, valid.
        effects: of its keys.
        given: dotted keys that the user gave; a group of keys stands for all of them.
    """
    values = dict(flat_values(config))
    for key, value in values.items():
        if value is None or not any(key == one or key.startswith(f"{one}.") for one in given):
            continue
        for condition in effects[key]:
            if not condition.acts(config):
                yield key, value, condition
                break


def idle_faults(config: Any, effects: Effects, given: Collection[str]) -> list[Fault]:
    """Faults of the given keys that must not be without effect."""
    return [
        Fault(key, value, _sentence(config, condition))
        for key, value, condition in idle_keys(config, effects, given)
        if condition.otherwise is Else.REFUSE
    ]


def given_keys(words: Sequence[str], groups: Collection[str]) -> set[str]:
    """Return the dotted keys that a command line gives values to; groups are recipes.

    Args:
        words: of which ``overrides.check_overrides`` found no fault; flags are passed over.
        groups: names of the folders of ``configs/``.
    """
    names = (word.partition("=")[0].lstrip("+~") for word in words if not word.startswith("-"))
    return {name for name in names if name not in groups}


def notices(config: Any, effects: Effects, given: Collection[str]) -> list[str]:
    """One line for each given key that has no effect."""
    return [
        f"notice: {key} {_sentence(config, condition)}"
        for key, _, condition in idle_keys(config, effects, given)
        if condition.otherwise is Else.NOTICE
    ]


def _sentence(config: Any, condition: Condition) -> str:
    value: Any = config
    for part in condition.key.split("."):
        value = getattr(value, part)
    return f"has no effect with {condition.key}={show(value)}{condition.advice}"


def _takes_engine(config: Config) -> bool:
    """Whether Transformer Engine's attention may be what runs; a dry run plans for any machine."""
    backend = config.model.attention
    if not config.run.dry_run and importlib.util.find_spec("transformer_engine") is None:
        return False
    if backend is AttentionBackend.auto:
        return derived.transformer_engine_limit(config) is None
    return backend is AttentionBackend.transformer_engine


_FAST = (Condition("ttt.mode", lambda c: c.ttt.mode is not TTTMode.off),)
_SPREAD = (Condition("parallel.cp", lambda c: c.parallel.cp > 1),)
_SCANS = _SPREAD + _FAST
_BOUNDS = (
    *_FAST,
    Condition("ttt.write.kind", lambda c: c.ttt.write.kind is WriteKind.bounded),
)
_CLIPS = (*_FAST, Condition("ttt.clip.mode", lambda c: c.ttt.clip.mode is not ClipMode.off))
_WANDB = (Condition("logging.wandb", lambda c: c.logging.wandb is not WandbMode.disabled),)


def _scaled_by(*scalings: RopeScaling) -> tuple[Condition, ...]:
    return (Condition("model.rope.scaling", lambda c: c.model.rope.scaling in scalings),)


TRAINING_EFFECTS: Effects = {
    "run.name": ALWAYS,
    "run.dir": ALWAYS,
    "run.resume": ALWAYS,
    "run.deterministic": ALWAYS,
    "run.dry_run": ALWAYS,
    "model.name": ALWAYS,
    "model.family": ALWAYS,
    "model.layers": ALWAYS,
    "model.hidden_size": ALWAYS,
    "model.ffn_hidden_size": ALWAYS,
    "model.heads": ALWAYS,
    "model.kv_groups": ALWAYS,
    "model.head_dim": ALWAYS,
    "model.vocab_size": ALWAYS,
    "model.max_positions": ALWAYS,
    "model.norm_epsilon": ALWAYS,
    "model.qk_norm": ALWAYS,
    "model.attention_bias": ALWAYS,
    "model.tied_embeddings": ALWAYS,
    "model.sliding_window": ALWAYS,
    "model.initializer_range": ALWAYS,
    "model.attention": ALWAYS,
    "model.rope.base": ALWAYS,
    "model.rope.scaling": ALWAYS,
    "model.rope.factor": ALWAYS,  # validate.py refuses it without a scaling
    "model.rope.original_max_positions": _scaled_by(RopeScaling.llama3, RopeScaling.yarn),
    "model.rope.low_freq_factor": _scaled_by(RopeScaling.llama3),
    "model.rope.high_freq_factor": _scaled_by(RopeScaling.llama3),
    "model.rope.beta_fast": _scaled_by(RopeScaling.yarn),
    "model.rope.beta_slow": _scaled_by(RopeScaling.yarn),
    "ttt.mode": ALWAYS,
    "ttt.layers": _FAST,
    "ttt.chunk_size": _FAST,
    "ttt.eta": _FAST,
    "ttt.normalize": _FAST,
    "ttt.target": _FAST,
    "ttt.conv": _FAST,
    "ttt.kernel_size": (*_FAST, Condition("ttt.conv", lambda c: c.ttt.conv.is_learned)),
    "ttt.proj": _FAST,
    "ttt.decay": _FAST,
    "ttt.clip.mode": _FAST,
    "ttt.clip.bound": _CLIPS,
    "ttt.write.kind": _FAST,
    "ttt.write.bound": _BOUNDS,
    "data.source": ALWAYS,
    "data.path": (
        Condition(
            "data.source",
            lambda c: c.data.source is DataSource.files,
            otherwise=Else.REFUSE,
            advice=": add data=files",
        ),
    ),
    "data.split": ALWAYS,
    "data.cache_dir": ALWAYS,
    "data.tokenizer.kind": ALWAYS,
    "data.tokenizer.name": (
        Condition(
            "data.tokenizer.kind", lambda c: c.data.tokenizer.kind is TokenizerKind.huggingface
        ),
    ),
    "data.tokenizer.bos": ALWAYS,  # bytes are compared as well
    "data.reset_attention": ALWAYS,
    "data.reset_positions": ALWAYS,
    "data.reset_fast_weights": _FAST,
    "data.mask_document_end": ALWAYS,
    "data.workers": ALWAYS,
    "data.changed": (Condition("run.resume", lambda c: c.run.resume != "never"),),
    "parallel.tp": ALWAYS,
    "parallel.cp": ALWAYS,
    "parallel.pp": ALWAYS,
    "parallel.sequence_parallel": (Condition("parallel.tp", lambda c: c.parallel.tp > 1),),
    "parallel.cp_order": _SPREAD,
    "parallel.scan": _SCANS,
    "parallel.scan_precision": _SCANS,
    "parallel.scan_constants": (
        *_SCANS,
        Condition("parallel.scan", lambda c: c.parallel.scan is ScanAlgorithm.auto),
    ),
    "parallel.cp_comm_type": (*_SPREAD, Condition("model.attention", _takes_engine)),
    "parallel.distributed_optimizer": ALWAYS,
    "parallel.overlap_grad_reduce": ALWAYS,
    "parallel.overlap_param_gather": ALWAYS,  # validate.py refuses what it needs
    "parallel.bucket_size": ALWAYS,  # as this one
    "parallel.timeout_s": ALWAYS,
    "optimizer.lr": ALWAYS,
    "optimizer.target_lr_factor": _FAST,
    "optimizer.min_lr": (
        Condition("optimizer.schedule", lambda c: c.optimizer.schedule is not Schedule.constant),
    ),
    "optimizer.schedule": ALWAYS,
    "optimizer.decay_fraction": (
        Condition("optimizer.schedule", lambda c: c.optimizer.schedule is not Schedule.constant),
    ),
    "optimizer.warmup_steps": ALWAYS,
    "optimizer.warmup_fraction": (
        Condition("optimizer.warmup_steps", lambda c: c.optimizer.warmup_steps is None),
    ),
    "optimizer.weight_decay": ALWAYS,
    "optimizer.beta1": ALWAYS,
    "optimizer.beta2": ALWAYS,
    "optimizer.epsilon": ALWAYS,
    "optimizer.clip_grad": ALWAYS,
    "train.steps": ALWAYS,
    "train.eta_warmup_steps": _FAST,
    "train.seed": ALWAYS,
    "train.seq_length": ALWAYS,
    "train.micro_batch_size": ALWAYS,
    "train.global_batch_size": ALWAYS,
    "train.precision": ALWAYS,
    "train.recompute": ALWAYS,
    "train.loss_tokens": ALWAYS,
    "train.trainable": ALWAYS,  # validate.py refuses what it needs
    "train.recompute_modules": (
        Condition("train.recompute", lambda c: c.train.recompute is Recompute.selective),
    ),
    "checkpoint.interval": ALWAYS,
    # resume.py says it where this run has a checkpoint of its own
    "checkpoint.load": (Condition("run.resume", lambda c: c.run.resume in ("never", "auto")),),
    "checkpoint.keep_last": ALWAYS,
    "checkpoint.keep_every": (
        Condition("checkpoint.keep_last", lambda c: c.checkpoint.keep_last is not None),
    ),
    "checkpoint.async_save": ALWAYS,
    "checkpoint.periodic": (
        Condition("parallel.distributed_optimizer", lambda c: c.parallel.distributed_optimizer),
    ),
    "validation.interval": ALWAYS,
    "validation.batches": (
        Condition("validation.interval", lambda c: c.validation.interval is not None),
    ),
    "logging.interval": ALWAYS,
    "logging.tensorboard": ALWAYS,
    "logging.wandb": ALWAYS,
    "logging.wandb_project": _WANDB,
    "logging.wandb_entity": _WANDB,
    "logging.plot": ALWAYS,
    "logging.sample_ids": ALWAYS,
    "logging.peak_tflops_per_device": ALWAYS,
}
