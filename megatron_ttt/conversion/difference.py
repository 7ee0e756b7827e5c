"""Two checkpoints of either kind, tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, MegatronFolder, row_blocks
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.manifest import described_model
from megatron_ttt.conversion.opened import holds_hugging_face
from megatron_ttt.conversion.source import MegatronView
from megatron_ttt.conversion.ttt_config import target_generator
from megatron_ttt.rule import added_start


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on both sides.

    Attributes:
        name: of the tensor.
        what: in words.
        largest: largest absolute difference of its elements; ``None`` where it has no meaning.
        is_common: whether both sides have it.
    """

    name: str
    what: str
    largest: float | None = None
    is_common: bool = True

    @property
    def is_addition(self) -> bool:
        """Whether one side alone has it, because fast weights add it to a plain model."""
        return not self.is_common and added_start(self.name) is not None


class Tensors(Protocol):
    """What is compared: names with shapes and dtypes, readable by rows."""

    def describe(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype by name."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)``."""
        ...


class _HF:
    def __init__(self, folder: HFFolder) -> None:
        self.rows = folder.rows
        self.folder = folder

    def describe(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (stored.shape, stored.dtype) for name, stored in self.folder.tensors.items()}


class _Megatron:
    def __init__(self, folder: MegatronFolder) -> None:
        self.folder = folder
        self.rows = folder.rows

    def describe(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (saved.shape, saved.dtype) for name, saved in self.folder.tensors.items()}


class _HFAsMegatron:
    def __init__(self, view: MegatronView) -> None:
        self.view = view

    def describe(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            tensor.megatron: (tensor.shape, self.view.dtype(tensor))
            for tensor in self.view.mapping.tensors
            if tensor.megatron not in self.view.drawn
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.view.rows(self.view.tensor(name), start, stop)


def differences(
    first: Path, second: Path, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[Difference]:
    """Yield what differs, in the order of the first folder's tensors.

    Folders of different kinds are compared under Megatron's names. Values are compared in fp32,
    equal bits first, so that equal NaNs are equal.

    Args:
        first, second: Hugging Face or Megatron folders.
        block_bytes: rows held at a time.

    Raises:
        ConfigError: a folder is neither, or damaged.
    """
    a, b = _open_both(first, second)
    of_a, of_b = a.describe(), b.describe()
    for name, (shape, dtype) in of_a.items():
        if name not in of_b:
            yield Difference(name, "only in the first", is_common=False)
            continue
        other_shape, other_dtype = of_b[name]
        if shape != other_shape:
            yield Difference(name, f"shape {list(shape)} and {list(other_shape)}")
            continue
        largest = 0.0
        equal = True
        for start, stop in row_blocks(shape, dtype, block_bytes):
            ours, theirs = a.rows(name, start, stop), b.rows(name, start, stop)
            if not _same_bits(ours, theirs):
                equal = False
                gap = (ours.float() - theirs.float()).abs().max().item()
                largest = gap if gap != gap else max(largest, gap)
        words = [] if dtype is other_dtype else [f"dtype {dtype} and {other_dtype}"]
        if not equal:
            words.append("values")
        if words:
            yield Difference(name, ", ".join(words), largest)
    for name in of_b:
        if name not in of_a:
            yield Difference(name, "only in the second", is_common=False)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype is not theirs.dtype:
        return torch.equal(ours.float(), theirs.float())
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def _open_both(first: Path, second: Path) -> tuple[Tensors, Tensors]:
    opened = [_open(first), _open(second)]
    if isinstance(opened[0], MegatronFolder) and isinstance(opened[1], MegatronFolder):
        return _Megatron(opened[0]), _Megatron(opened[1])
    if isinstance(opened[0], HFFolder) and isinstance(opened[1], HFFolder):
        return _HF(opened[0]), _HF(opened[1])
    views: list[Tensors] = []
    megatron = next(folder for folder in opened if isinstance(folder, MegatronFolder))
    for folder in opened:
        if isinstance(folder, MegatronFolder):
            views.append(_Megatron(folder))
        else:
            model, ttt = described_model(megatron)
            target = target_generator(ttt, layers=model.layers)
            chosen = None if ttt.mode is TTTMode.off else target
            views.append(_HFAsMegatron(MegatronView(folder, target=chosen, seed=0)))
    return views[0], views[1]


def _open(path: Path) -> HFFolder | MegatronFolder:
    return HFFolder(path) if holds_hugging_face(path) else MegatronFolder(path)
