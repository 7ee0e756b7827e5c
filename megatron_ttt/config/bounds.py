"""What a number or a text of the configuration may be on its own, as a table. No torch.

Every number of a schema has an entry: a value beyond it would fail later and elsewhere, in an
allocation, an overflow, a loop without end. What depends on other keys is in ``validate.py``.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_ttt.config.faults import Fault
from megatron_ttt.rule import LARGEST_KERNEL

INT32 = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # of numpy's generators, which shuffle the data
LARGEST_PATH, LARGEST_NAME = 4096, 255  # bytes of a path and of each of its parts, on Linux


@dataclass(frozen=True)
class Bound:
    """An interval of numbers; a list is valid when all its members are.

    Attributes:
        least, most: the ends; ``most`` belongs to the interval.
        open: ``least`` does not belong to it.
        words: what must hold, where the ends do not say it well.
    """

    least: float = 0
    most: float = INT32
    open: bool = False
    words: str | None = None

    def complaint(self, value: float) -> str | None:
        """Why the number is not valid; ``None``: it is."""
        low = value > self.least if self.open else value >= self.least
        if low and value <= self.most:
            return None
        if self.words is not None:
            return self.words
        if low:
            return f"must be at most {_plain(self.most)}"
        return f"must be {'above' if self.open else 'at least'} {_plain(self.least)}"


COUNT = Bound(1)
RANKS = Bound(1, 2**16)
SIZE = Bound(1, 2**24)
SEED = Bound(0, LARGEST_SEED)
POSITIVE = Bound(0, 1e30, open=True)
FRACTION = Bound(0, math.nextafter(1, 0), words="must lie in [0, 1)")

RULE_BOUNDS: Mapping[str, Bound] = {
    "ttt.chunk_size": COUNT,
    "ttt.eta": Bound(0, 1e6),
    "ttt.decay": Bound(0, 1, open=True, words="must lie in (0, 1]; 1 keeps everything"),
    "ttt.clip.bound": POSITIVE,
}

TRAINING_BOUNDS: Mapping[str, Bound] = {
    **RULE_BOUNDS,
    "model.layers": Bound(1, 10_000),
    "model.hidden_size": SIZE,
    "model.ffn_hidden_size": SIZE,
    "model.heads": Bound(1, 2**16),
    "model.kv_groups": Bound(1, 2**16),
    "model.head_dim": Bound(1, 2**16),
    "model.vocab_size": COUNT,
    "model.max_positions": COUNT,
    "model.sliding_window": COUNT,
    "model.norm_epsilon": Bound(0, 1, open=True),
    "model.initializer_range": Bound(0, 1e3, open=True),
    "model.rope.base": Bound(1, 1e30, open=True),
    "model.rope.factor": POSITIVE,
    "model.rope.original_max_positions": COUNT,
    "model.rope.low_freq_factor": Bound(-1e30, 1e30),
    "model.rope.high_freq_factor": Bound(-1e30, 1e30),
    "model.rope.beta_fast": Bound(-1e30, 1e30),
    "model.rope.beta_slow": Bound(-1e30, 1e30),
    "ttt.layers": Bound(-INT32),
    "ttt.write.bound": POSITIVE,
    "ttt.kernel_size": Bound(1, LARGEST_KERNEL),
    "data.workers": Bound(0, 1024),
    "parallel.tp": RANKS,
    "parallel.cp": RANKS,
    "parallel.pp": RANKS,
    "parallel.bucket_size": Bound(1, 2**62),
    "parallel.timeout_s": COUNT,
    "optimizer.lr": Bound(0, 1e3),
    "optimizer.min_lr": Bound(0, 1e3),
    "optimizer.target_lr_factor": Bound(0, 1e6, open=True),
    "optimizer.warmup_steps": Bound(0),
    "optimizer.warmup_fraction": FRACTION,
    "optimizer.decay_fraction": Bound(0, 1, open=True, words="must lie in (0, 1]"),
    "optimizer.weight_decay": Bound(0, 1e3),
    "optimizer.beta1": FRACTION,
    "optimizer.beta2": FRACTION,
    "optimizer.epsilon": Bound(0, 1e3, open=True),
    "optimizer.clip_grad": Bound(0, 1e30),
    "train.steps": COUNT,
    "train.eta_warmup_steps": Bound(0),
    "train.seed": SEED,
    "train.seq_length": COUNT,
    "train.loss_tokens": COUNT,
    "train.micro_batch_size": COUNT,
    "train.global_batch_size": COUNT,
    "checkpoint.interval": COUNT,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": COUNT,
    "validation.interval": COUNT,
    "validation.batches": COUNT,
    "logging.interval": COUNT,
    "logging.peak_tflops_per_device": Bound(0, 1e12, open=True),
}

# Texts of which validate.py knows every valid form, and says it to an empty one as well.
FIXED_TEXTS = ("data.split", "parallel.cp_comm_type", "run.resume")


def bound_faults(config: Any, bounds: Mapping[str, Bound]) -> list[Fault]:
    """Faults of single values, in the order of the schema.

    Args:
        config: a dataclass of a schema; numbers, texts and lists of them are looked at.
        bounds: of its numbers, by dotted key; a test holds them to the schema. What a key of any
            type holds is checked where it is taken apart.
    """
    return list(_walk(config, "", bounds))


def text_complaint(text: str) -> str | None:
    """Why a text cannot be a name or a path; ``None``: it can."""
    if not text.strip():
        return "must not be empty"
    if not text.isprintable():
        return "has characters that do not print"
    longest = max(len(part.encode(errors="replace")) for part in text.split("/"))
    if longest > LARGEST_NAME or len(text.encode(errors="replace")) > LARGEST_PATH:
        return f"is too long: at most {LARGEST_NAME} bytes between slashes, {LARGEST_PATH} in all"
    return None


def flat_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dataclasses by dotted key."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat_values(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _walk(config: Any, prefix: str, bounds: Mapping[str, Bound]) -> Iterator[Fault]:
    for key, value in flat_values(config, prefix):
        for member in value if isinstance(value, list) else [value]:
            complaint = _complaint(key, member, bounds)
            if complaint is not None:
                yield Fault(key, value, complaint)
                break


def _complaint(key: str, value: Any, bounds: Mapping[str, Bound]) -> str | None:
    if isinstance(value, str):
        return None if key in FIXED_TEXTS and not value.strip() else text_complaint(value)
    if isinstance(value, bool | Enum) or not isinstance(value, int | float):
        return None
    return bounds[key].complaint(value) if key in bounds else None


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) and number < 1e15 else f"{number:g}"
