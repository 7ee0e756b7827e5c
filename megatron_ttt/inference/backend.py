"""What a program that generates needs of a model, whichever kind of checkpoint it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_ttt.data.tokenizers import ModelTokenizer
from megatron_ttt.inference.fast_weight_state import Unfinished
from megatron_ttt.inference.generation import Reader
from megatron_ttt.inference.sampling import Sampler
from megatron_ttt.inference.state_files import StateFileError

AnyReader = TypeVar("AnyReader", bound=Reader)


class UnfitModel(ValueError):
    """A folder that holds no model which can be read here; the message is one line."""


@dataclass
class Turn:
    """Where a conversation stands beside what the model holds.

    Attributes:
        unread: tokens of each row that were generated and not read yet.
        generator: state of the sampler's random generator.
    """

    unread: list[list[int]]
    generator: Tensor

    @classmethod
    def after(cls, unread: list[list[int]], sampler: Sampler) -> Turn:
        return cls(unread, sampler.generator.get_state())

    def tensors(self) -> dict[str, Tensor]:
        return {"generator": self.generator}

    def extra(self) -> dict[str, Any]:
        return {"unread": self.unread}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], extra: dict[str, Any], path: Path) -> Turn:
        """Return the turn that a session was saved with.

        Raises:
            StateFileError: the session was saved without it.
        """
        try:
            return cls([list(row) for row in extra["unread"]], tensors["generator"])
        except (KeyError, TypeError) as error:
            raise StateFileError(f"{path}: the session is incomplete: {error!r}") from error


class Backend(Protocol, Generic[AnyReader]):
    """A loaded model.

    Attributes:
        speaks: true on the one rank that prints.
        device: where the model lives.
        max_positions, vocab_size: what it was made for.
        stop_tokens: that the checkpoint names; empty: the tokenizer's end of document.
        tokenizer: what the checkpoint says about the one that belongs to it.
    """

    speaks: bool
    device: torch.device
    max_positions: int
    vocab_size: int
    stop_tokens: frozenset[int]
    tokenizer: ModelTokenizer

    def new_reader(self, batch: int) -> AnyReader:
        """Return a reader at position 0 with the trained weights."""
        ...

    def save_session(self, path: Path, reader: AnyReader, turn: Turn) -> None:
        """Write everything that a conversation goes on from to a file.

        Raises:
            StateFileError: it cannot be written, or the fast weights are off.
        """
        ...

    def has_session(self, path: Path) -> bool:
        """Whether this rank's file of a session exists."""
        ...

    def load_session(self, path: Path) -> tuple[AnyReader, Turn]:
        """Return the reader and the turn that a session was saved with.

        Raises:
            StateFileError: missing, damaged, of another model, or the fast weights are off.
        """
        ...

    def save_memory(self, path: Path, reader: AnyReader, rest: Unfinished) -> None:
        """Write the fast weights' states, without the context, to a file.

        Raises:
            StateFileError: as ``save_session``; or no chunk has been written.
        """
        ...

    def load_memory(self, path: Path, batch: int) -> AnyReader:
        """Return a reader at position 0 with a memory's states.

        Raises:
            StateFileError: as ``load_session``.
        """
        ...
