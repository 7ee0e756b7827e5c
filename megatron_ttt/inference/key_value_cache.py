"""Keys and values of one attention layer, every row at places of its own.

Padding takes no place: a row's ``n``-th real token lies at place ``n``, whatever the other rows
hold, so that rows of different lengths need no mask of holes.

Shape suffixes: B batch rows, T tokens of a call, S places, A heads, G
key/value groups, E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ttt.inference.token_runs import TokenRuns
from megatron_ttt.model.attention_plan import plan_reading
from megatron_ttt.model.block_attention import block_attention
from megatron_ttt.model.masked_attention import attend_at_places, masked_attention

_FEW = 16  # queries of rows at different places that are attended from at once, masked
_GROWTH = 256  # places; the buffer doubles beyond it


class KeyValueCache:
    """Grows by doubling; ``places[b]`` real tokens of row ``b`` are held."""

    def __init__(self, *, batch: int) -> None:
        self.places = [0] * batch
        self.keys_BSGE: Tensor | None = None
        self.values_BSGE: Tensor | None = None

    def attend(
        self,
        query_BTAE: Tensor,
        key_BTGE: Tensor,
        value_BTGE: Tensor,
        runs: TokenRuns,
        *,
        window: int | None,
        scale: float,
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Hold the call's keys and values, then attend causally: ``[B, T, A, E]``.

        A query sees its own place and those before it, ``window`` of them at most. Outputs of
        padding mean nothing. ``ranges``: the tokens ``[start, end)`` of the call that the queries
        are, one range after another; None: all of them.
        """
        self._append(key_BTGE, value_BTGE, runs)
        assert self.keys_BSGE is not None and self.values_BSGE is not None
        longest = max(self.places)
        keys, values = (
            held[:, :longest].transpose(1, 2) for held in (self.keys_BSGE, self.values_BSGE)
        )
        query = query_BTAE.transpose(1, 2)
        before = [place - count for place, count in zip(self.places, runs.count, strict=True)]
        if ranges is None and runs.length <= _FEW and len(set(before)) > 1:
            places = [place - first for place, first in zip(before, runs.first, strict=True)]
            attended = attend_at_places(
                query, keys, values, places=places, window=window, scale=scale
            )
            return attended.transpose(1, 2)
        plan = plan_reading(
            before,
            [(first, first + count) for first, count in zip(runs.first, runs.count, strict=True)],
            ranges=ranges or [(0, runs.length)],
        )
        kernel = block_attention if query.is_cpu else masked_attention
        attended = kernel(query, keys, values, plan=plan, window=window, scale=scale)
        return attended.transpose(1, 2)

    def select(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        self.places = [self.places[row] for row in rows]
        if self.keys_BSGE is not None and self.values_BSGE is not None:
            index = torch.tensor(list(rows), device=self.keys_BSGE.device)
            self.keys_BSGE = self.keys_BSGE.index_select(0, index)
            self.values_BSGE = self.values_BSGE.index_select(0, index)

    def rewind(self, places: Sequence[int]) -> None:
        """Go back to where the rows once stood; what came after is written over."""
        assert all(then <= now for then, now in zip(places, self.places, strict=True))
        self.places = list(places)

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B, S, G, E]`` up to the longest row, or None."""
        if self.keys_BSGE is None or self.values_BSGE is None:
            return None
        longest = max(self.places)
        return self.keys_BSGE[:, :longest], self.values_BSGE[:, :longest]

    def restore(self, places: Sequence[int], held: tuple[Tensor, Tensor] | None) -> None:
        """Continue from what ``places`` and ``held`` once were."""
        self.places = list(places)
        self.keys_BSGE, self.values_BSGE = held or (None, None)

    def _append(self, key_BTGE: Tensor, value_BTGE: Tensor, runs: TokenRuns) -> None:
        ends = [place + count for place, count in zip(self.places, runs.count, strict=True)]
        self._reserve(max(ends), key_BTGE, value_BTGE)
        assert self.keys_BSGE is not None and self.values_BSGE is not None
        if runs.all_real and len(set(self.places)) == 1:
            there = slice(self.places[0], ends[0])
            self.keys_BSGE[:, there], self.values_BSGE[:, there] = key_BTGE, value_BTGE
        else:
            for row, (first, count) in enumerate(zip(runs.first, runs.count, strict=True)):
                here = slice(first, first + count)
                there = slice(self.places[row], ends[row])
                self.keys_BSGE[row, there] = key_BTGE[row, here]
                self.values_BSGE[row, there] = value_BTGE[row, here]
        self.places = ends

    def _reserve(self, needed: int, *like: Tensor) -> None:
        old = (self.keys_BSGE, self.values_BSGE)
        capacity = 0 if old[0] is None else old[0].shape[1]
        if needed <= capacity:
            return
        capacity = max(needed, 2 * capacity, _GROWTH)
        new = []
        for tensor, held in zip(like, old, strict=True):
            batch, _, *rest = tensor.shape
            # Zeros, since a padding query may look at places that nothing was written to.
            grown = tensor.new_zeros(batch, capacity, *rest)
            if held is not None:
                grown[:, : held.shape[1]] = held
            new.append(grown)
        self.keys_BSGE, self.values_BSGE = new
