"""The cache of ``generate()`` with fast weights: keys and values, and each layer's fast weights.

Shape suffixes: B batch rows, T tokens of a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_ttt.hf.configuration import update_rule
from megatron_ttt.inference.fast_weight_state import FastWeightState
from megatron_ttt.inference.token_runs import TokenRuns, runs_of_mask, whole_runs


class FastWeightCache(DynamicCache):
    """A ``DynamicCache`` that also moves, and is moved by, the fast weights.

    Beam reorder, repetition and selection of rows move both. What a fast weight has read cannot be
    taken out of it again, so cropping is refused, and with it assisted decoding.

    Attributes:
        fast_weights: one state per fast-weight layer (index from 0), made at the first call.
        stop_tokens: rows that have been fed one of these by ``generate`` no longer write.
    """

    def __init__(self, config: Any, *, offloading: bool = False) -> None:
        super().__init__(config=config, offloading=offloading)
        self.rule = update_rule(config)
        self.fast_weights: dict[int, FastWeightState] = {}
        self.stop_tokens: frozenset[int] = frozenset()
        self._stopped: list[bool] = []
        self._silent: list[bool] = []  # rows whose next token is past their stop token

    @property
    def is_croppable(self) -> bool:
        return False

    def state_of(self, layer: int, *, batch: int) -> FastWeightState:
        """Return the state of a layer, a fresh one before its first call."""
        if layer not in self.fast_weights:
            self.fast_weights[layer] = FastWeightState(self.rule, batch=batch)
        return self.fast_weights[layer]

    def start_turn(self, stop_tokens: Iterable[int]) -> None:
        """All rows write again, until they are fed a stop token."""
        self.stop_tokens = frozenset(stop_tokens)
        self._stopped, self._silent = [], []

    def begin_step(self, tokens_B: Tensor) -> None:
        """Note the generated tokens that the next call feeds, one per row."""
        if not self.stop_tokens:
            return
        fed = [token in self.stop_tokens for token in tokens_B.tolist()]
        self._silent = self._stopped or [False] * len(fed)
        self._stopped = [old or new for old, new in zip(self._silent, fed, strict=True)]

    def runs(self, attention_mask: Tensor | None, *, batch: int, length: int) -> TokenRuns:
        """Which of a call's tokens are real, ``attention_mask`` being ``[B, past + T]`` or None.

        Raises:
            ValueError: another number of rows than before, or padding between a row's tokens.
        """
        for state in self.fast_weights.values():
            if state.batch != batch:
                raise ValueError(f"{batch} rows cannot continue a state of {state.batch}")
        if attention_mask is None:
            runs = whole_runs(batch, length)
        else:
            runs = runs_of_mask(attention_mask[:, -length:])
        if any(self._silent):
            count = [
                0 if silent else old for silent, old in zip(self._silent, runs.count, strict=True)
            ]
            runs = TokenRuns(runs.first, tuple(count), length)
        self._silent = []
        return runs

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        indices = torch.as_tensor(indices)
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for state in self.fast_weights.values():
            state.repeat(repeats)
        self._stopped = [stopped for stopped in self._stopped for _ in range(repeats)]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: see the class.

        Raises:
            ValueError: always, unless there is nothing to remove.
        """
        if tokens_to_remove == 0:
            return
        raise ValueError(
            f"cannot crop {abs(tokens_to_remove)} tokens: what fast weights have read cannot be "
            "taken back; copy the cache before reading, or set ttt_mode=False"
        )

    def reset(self) -> None:
        super().reset()
        self.fast_weights.clear()
        self.start_turn(())

    def _select(self, rows: Sequence[int]) -> None:
        for state in self.fast_weights.values():
            state.select(rows)
        if self._stopped:
            self._stopped = [self._stopped[row] for row in rows]
