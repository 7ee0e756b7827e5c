"""Rules that relate Megatron's tensors to Hugging Face's: every one moves whole runs of rows.

A Megatron tensor, as a distributed checkpoint stores it (whole, not split over ranks), is a stack
of row runs of Hugging Face tensors. Renaming is one run; Megatron's attention stacks, for every
key-value group, the group's queries, its key and its value; the gated MLP stacks gate on up. Since
rows are only moved, a conversion there and back gives equal bits, either direction can stream, and
a rank can read the rows of its own slice alone.

Shape letters: H hidden, F ffn, Q heads * head_dim, K kv_groups * head_dim, E head_dim, W
vocabulary; digits stand for themselves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ttt.config.schema import ModelConfig


@dataclass(frozen=True)
class Run:
    """Rows ``[start, start + count)`` of the Hugging Face tensor ``tensor``."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True)
class TensorMap:
    """One Megatron tensor.

    Attributes:
        megatron: its key in a distributed checkpoint.
        shape: whole, without rows that pad the vocabulary.
        runs: of Hugging Face rows, in the order in which Megatron stacks them.
    """

    megatron: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The Hugging Face tensors it is made of."""
        return tuple(dict.fromkeys(run.tensor for run in self.runs))

    def bytes(self, dtype: torch.dtype) -> int:
        """Its size in a checkpoint of that dtype."""
        return math.prod(self.shape) * dtype.itemsize

    def select_rows(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs that make up rows ``[start, stop)``, cut to size."""
        first = 0
        for run in self.runs:
            low, high = max(start, first), min(stop, first + run.count)
            if low < high:
                yield Run(run.tensor, run.start + low - first, high - low)
            first += run.count


@dataclass(frozen=True)
class Copy:
    """The same tensor under two names; ``shape`` in shape letters."""

    megatron: str
    hf: str
    shape: str

    def expand(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[Run, ...]]:
        """Shape and runs for a model's sizes."""
        shape = shape_of(self.shape, sizes)
        return shape, (Run(self.hf, 0, shape[0]),)


@dataclass(frozen=True)
class InterleavedQKV:
    """Per key-value group: the rows of its query heads, of its key, of its value.

    ``columns`` is empty for a bias.
    """

    megatron: str
    query: str
    key: str
    value: str
    columns: str

    def expand(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[Run, ...]]:
        """Shape and runs for a model's sizes."""
        head, groups = sizes["E"], sizes["K"] // sizes["E"]
        queries = sizes["Q"] // groups
        runs = []
        for group in range(groups):
            runs.append(Run(self.query, group * queries, queries))
            runs.append(Run(self.key, group * head, head))
            runs.append(Run(self.value, group * head, head))
        rows = sizes["Q"] + 2 * sizes["K"]
        return (rows, *shape_of(self.columns, sizes)), tuple(runs)


@dataclass(frozen=True)
class StackedGate:
    """All rows of the gate projection, then all of the up projection."""

    megatron: str
    gate: str
    up: str

    def expand(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[Run, ...]]:
        """Shape and runs for a model's sizes."""
        ffn = sizes["F"]
        return (2 * ffn, sizes["H"]), (Run(self.gate, 0, ffn), Run(self.up, 0, ffn))


Rule = Copy | InterleavedQKV | StackedGate


@dataclass(frozen=True)
class AlwaysZero:
    """A Hugging Face tensor without a place in Megatron: accepted if zero, exported as zeros."""

    hf: str
    shape: str


def shape_of(letters: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """``"H15"`` -> ``(hidden, 1, 5)``."""
    return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in letters)


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """Return what the shape letters stand for."""
    return {
        "H": model.hidden_size,
        "F": model.ffn_hidden_size,
        "Q": model.heads * model.head_dim,
        "K": model.kv_groups * model.head_dim,
        "E": model.head_dim,
        "W": model.vocab_size,
    }
