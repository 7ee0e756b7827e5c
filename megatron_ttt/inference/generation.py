"""From prompts to new tokens, with whatever reads: a Megatron session or a transformers model.

Shape suffixes: B batch rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_ttt.inference.sampling import Sampler


class Reader(Protocol):
    """Reads tokens and remembers them."""

    @property
    def places(self) -> list[int]:
        """How many tokens each row has read."""
        ...

    def read_last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read new tokens (none: the row stays as it is); logits ``[B, V]`` after the last one."""
        ...


@dataclass
class Generated:
    """What one call of ``generate`` made.

    Attributes:
        tokens: new tokens of each row, its stop token included.
        unread: the last new token of each row, which nothing has read yet; it begins the next
            turn.
        stopped: whether the row ended with a stop token.
        prompt_tokens, prompt_seconds: read before the first new token.
        decode_seconds: from the first new token to the last.
    """

    tokens: list[list[int]]
    unread: list[list[int]]
    stopped: list[bool]
    prompt_tokens: int
    prompt_seconds: float
    decode_seconds: float = 0.0
    steps: int = field(default=0)


def generate(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> Generated:
    """Read the prompts, then choose and read one token a row until all rows stop.

    A row past its stop token is not read any further: it takes no place and writes nothing.

    Args:
        prompts: new tokens of each row, at least one.
        on_tokens: called after each step with the rows' new tokens, None where a row has stopped.

    Raises:
        ValueError: an empty prompt.
    """
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty")
    started = time.perf_counter()
    logits_BV = reader.read_last(prompts)
    chosen = sampler.choose(logits_BV)  # waits for the device
    first_token = time.perf_counter()
    batch = len(prompts)
    result = Generated(
        tokens=[[] for _ in range(batch)],
        unread=[[] for _ in range(batch)],
        stopped=[False] * batch,
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        prompt_seconds=first_token - started,
    )
    while result.steps < max_new_tokens:
        new: list[int | None] = [
            None if stopped else token
            for token, stopped in zip(chosen, result.stopped, strict=True)
        ]
        for row, token in enumerate(new):
            if token is not None:
                result.tokens[row].append(token)
                result.unread[row] = [token]
                result.stopped[row] = token in stop_tokens
        result.steps += 1
        if on_tokens is not None:
            on_tokens(new)
        if all(result.stopped) or result.steps == max_new_tokens:
            break
        going = [
            [] if stopped else tokens
            for tokens, stopped in zip(result.unread, result.stopped, strict=True)
        ]
        chosen = sampler.choose(reader.read_last(going))
    result.decode_seconds = time.perf_counter() - first_token
    return result
