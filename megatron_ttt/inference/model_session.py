"""Reading with a Megatron model: chunked prefill and decoding that continue each other.

A session holds, for a batch of rows, the keys and values of every layer and the fast weights of
those that have them. It travels to the layers inside the call's :class:`SequenceLayout`, never as
module state. Rows may have different lengths and grow by different numbers of tokens a call.

Tensor parallelism: every rank of the group holds a session with its shards and makes the same
calls. Context parallelism: the whole chunks of a long prompt are dealt to the ranks as in training,
then every rank holds all keys, values and states, and the ranks read the rest and decode alike.
Sequence and pipeline parallelism are refused.

Shape letters: B batch rows, T tokens of a call, L tokens (Megatron's sequence-first tensors), H
hidden, F ffn / tp, A heads, G key/value groups, E head dim, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.schema import ComputeConfig, TTTMode
from megatron_ttt.fast_weights.write_rules import TokenInputs
from megatron_ttt.inference.fast_weight_state import (
    ContextSpans,
    FastWeightState,
    LayerTensors,
    MakeWrite,
)
from megatron_ttt.inference.key_value_cache import KeyValueCache
from megatron_ttt.inference.token_runs import TokenRuns
from megatron_ttt.model.attention import TorchAttention
from megatron_ttt.model.gpt import InPlaceTTTModel
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.model.sequence_layout import (
    SequenceLayout,
    sequence_layout,
    take_ranges,
)
from megatron_ttt.parallel.broadcast import broadcast_from
from megatron_ttt.parallel.collectives import gather_sequences
from megatron_ttt.parallel.layout import rank_of_span, total_spans

PREFILL_TOKENS = 2048


class LogitsOf(Enum):
    """Which positions' logits a call returns."""

    LAST = "last"  # each row's last token: [B, 1, W]
    ALL = "all"  # every token: [B, T, W]


@dataclass(frozen=True)
class Mark:
    """Where a session stood: its rows' places and a copy of its fast weights."""

    places: tuple[int, ...]
    fast_weights: dict[int, FastWeightState]


class ModelSession:
    """What a Megatron model has read; see the module's lines.

    ``fast_weights`` and ``attention`` hold one state per layer, counted from 0.
    """

    def __init__(
        self,
        model: InPlaceTTTModel,
        config: ComputeConfig,
        groups: ProcessGroupCollection,
        *,
        scan_group: Any,
        batch: int,
        device: torch.device,
        mode: TTTMode = TTTMode.in_place,
    ) -> None:
        """Start a session that has read nothing.

        Args:
            model: built from ``config`` with the torch attention backend, in ``eval`` mode.
            groups: Megatron's process groups.
            scan_group: the context-parallel ranks' own for states (``Ranks.scan_group``).
            batch: rows.
            device: the model's.
            mode: ``off`` computes the model without its fast weights.

        Raises:
            ValueError: a kind of parallelism that a session has no part for.
        """
        if groups.pp.size() > 1:
            raise ValueError(f"parallel.pp={groups.pp.size()}: reading with a session needs pp=1")
        if model.config.sequence_parallel:
            raise ValueError("parallel.sequence_parallel=on: set it off to read token by token")
        attention = model.decoder.layers[0].self_attention.core_attention
        if not isinstance(attention, TorchAttention):
            raise ValueError(
                "model.attention=transformer_engine: reading needs model.attention=torch"
            )
        self.model, self.config, self.device = model, config, device
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.places = [0] * batch
        fast = ttt_layers(config) if mode is TTTMode.in_place else []
        self.writes_fast_weights = bool(fast)
        self.fast_weights: dict[int, FastWeightState] = {}
        if fast:
            self.fast_weights = {layer: FastWeightState(config.ttt, batch=batch) for layer in fast}
        self.attention = {layer: KeyValueCache(batch=batch) for layer in range(config.model.layers)}
        self._scan = scan_settings(config.parallel, scan_group)
        self._runs: TokenRuns | None = None
        self._split: SequenceLayout | None = None  # of a call that is dealt to the cp ranks
        self._wanted = LogitsOf.LAST

    @property
    def batch(self) -> int:
        return len(self.places)

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], *, logits: LogitsOf = LogitsOf.LAST) -> Tensor:
        """Read new tokens of every row; a row without any is not changed.

        Args:
            rows: one sequence of token ids per row.
            logits: ``LAST`` reads long rows ``PREFILL_TOKENS`` at a time.

        Returns:
            ``[B, 1, W]`` or ``[B, T, W]`` over the whole (padded) vocabulary, on every tensor rank.
            What stands in a row's padding, or in a row without tokens, means nothing.
        """
        assert len(rows) == self.batch
        longest = max(len(row) for row in rows)
        if longest == 0:
            raise ValueError("there is nothing to read: every row is empty")
        if logits is LogitsOf.LAST and self.cp_group.size() > 1:
            rows = self._read_with_all_ranks(rows)
            longest = max(len(row) for row in rows)
        step = PREFILL_TOKENS if logits is LogitsOf.LAST else longest
        result: Tensor | None = None
        for first in range(0, longest, step):
            some = [row[first : first + step] for row in rows]
            found = self._read(some, logits)
            if result is None:
                result = found
            for row, tokens in enumerate(some):
                if len(tokens):
                    result[row] = found[row]
        assert result is not None
        return result

    def read_last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``[B, V]`` over the real vocabulary after each row's last new token."""
        return self.read(rows)[:, 0, : self.config.model.vocab_size]

    def select(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was: beam reorder, repeat and select."""
        self.places = [self.places[row] for row in rows]
        for fast_weight in self.fast_weights.values():
            fast_weight.select(rows)
        for cache in self.attention.values():
            cache.select(rows)

    def mark(self) -> Mark:
        """Where the session stands now, for :meth:`rewind`.

        Fast weights are copied; keys and values, which only grow, are not.
        """
        return Mark(tuple(self.places), deepcopy(self.fast_weights))

    def rewind(self, mark: Mark) -> None:
        """Go back to ``mark``, whatever was read since, except ``select``; a mark serves once."""
        self.places = list(mark.places)
        self.fast_weights = mark.fast_weights
        for cache in self.attention.values():
            cache.rewind(mark.places)

    def flush(self) -> None:
        """Write the unfinished chunk of every layer; the chunk grid starts anew behind it."""
        for layer, state in self.fast_weights.items():
            mlp: Any = self.model.decoder.layers[layer].mlp
            state.flush(mlp.linear_fc2(), mlp.make_write)

    # What the layers call (``sequence_layout.ReadingSession``):

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Attend: queries ``[L, B, A, E]``, keys, values ``[L, B, G, E]`` to ``[L, B, A * E]``."""
        assert self._runs is not None
        ranges = None
        if self._split is not None:
            ranges, order = self._split.ranges, self._split.order
            key, value = gather_sequences(key, value, group=self.cp_group, order=order)
        attended = self.attention[layer].attend(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            self._runs,
            window=window,
            scale=scale,
            ranges=ranges,
        )
        return attended.transpose(0, 1).flatten(2)

    def read_fast_weight(
        self,
        layer: int,
        tokens: TokenInputs,
        weight: Tensor,
        make_write: MakeWrite,
    ) -> Tensor:
        """Read the call's tokens: outputs ``[B, L, H]``."""
        assert self._runs is not None
        tensors = LayerTensors(tokens, weight, make_write)
        if self._split is not None:
            return self.fast_weights[layer].read_spans(tensors, self._spans(layer, self._split))
        return self.fast_weights[layer].read(tensors, self._runs)

    def select_hidden(self, hidden_states: Tensor) -> Tensor:
        """``[L, B, H]`` to the positions whose logits are wanted."""
        if self._split is not None:
            return hidden_states[-1:]  # what follows is read without a split, and has the logits
        if self._wanted is LogitsOf.ALL or len(hidden_states) == 1:
            return hidden_states
        assert self._runs is not None
        last = torch.tensor([max(count - 1, 0) for count in self._runs.count], device=self.device)
        rows = torch.arange(self.batch, device=self.device)
        return hidden_states[last, rows][None]

    def _read_with_all_ranks(self, rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Read the whole chunks that all rows have, dealt to the cp ranks; returns what is left.

        At least one token of each row is left, for its logits.
        """
        ranks, order = self.cp_group.size(), self._scan.order
        unit = total_spans(ranks, order) * (self.config.ttt.chunk_size if self.fast_weights else 1)
        whole = max(0, min(len(row) for row in rows) - 1) // unit * unit
        if any(
            state.pending[row] for state in self.fast_weights.values() for row in range(self.batch)
        ):
            whole = 0  # the chunk grid of some row does not begin here
        step = max(1, ranks * PREFILL_TOKENS // unit) * unit
        for first in range(0, whole, step):
            self._read_split([row[first : min(first + step, whole)] for row in rows])
        return [row[whole:] for row in rows]

    def _read_split(self, rows: Sequence[Sequence[int]]) -> None:
        length = len(rows[0])
        nothing = torch.zeros(self.batch, length, dtype=torch.bool)
        layout = sequence_layout(
            document_starts=nothing,
            padding=nothing,
            chunk_size=self.config.ttt.chunk_size if self.fast_weights else None,
            decay=self.config.ttt.decay,
            mask_attention=False,
            window=self.config.model.sliding_window,
            reset_positions=False,
            reset_fast_weights=False,
            scan=self._scan,
            device=self.device,
        )
        assert layout.positions is not None
        starts = torch.tensor(self.places, device=self.device)[:, None]
        layout.positions = layout.positions + starts
        layout.session = self
        tokens = take_ranges(torch.tensor([list(row) for row in rows]), layout.ranges)
        self._runs = TokenRuns((0,) * self.batch, (length,) * self.batch, length)
        self._split = layout
        try:
            self._call(tokens, layout)
        finally:
            self._split = None
        self.places = [place + length for place in self.places]

    def _spans(self, layer: int, layout: SequenceLayout) -> ContextSpans:
        ranks, order = self.cp_group.size(), layout.order
        owner = rank_of_span(total_spans(ranks, order) - 1, ranks, order)
        assert layout.plan is not None and layout.exchange is not None
        return ContextSpans(
            plan=layout.plan,
            count=len(layout.ranges),
            exchange=layout.exchange.for_layer(f"layer {layer}"),
            has_first=self.cp_group.rank() == rank_of_span(0, ranks, order),
            share_last=partial(broadcast_from, group=self.cp_group, owner=owner),
            length=layout.length,
        )

    def _call(self, tokens: Tensor, layout: SequenceLayout) -> Tensor:
        return self.model(
            input_ids=tokens.to(self.device),
            position_ids=layout.positions,
            attention_mask=None,
            packed_seq_params=layout,
        )

    def _read(self, rows: Sequence[Sequence[int]], logits: LogitsOf) -> Tensor:
        count = tuple(len(row) for row in rows)
        length = max(count)
        tokens = torch.zeros(self.batch, length, dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.as_tensor(ids)
        self._runs = TokenRuns((0,) * self.batch, count, length)
        self._wanted = logits
        positions = torch.tensor(self.places)[:, None] + torch.arange(length)
        layout = SequenceLayout(
            qkv_format="sbhd",
            max_seqlen_q=length,
            max_seqlen_kv=length,
            length=length,
            ranges=[(0, length)],
            positions=positions.to(self.device),
            session=self,
        )
        found = self._call(tokens, layout)
        self.places = [place + new for place, new in zip(self.places, count, strict=True)]
        if self.tp_group.size() > 1:
            found = gather_from_tensor_model_parallel_region(found, group=self.tp_group)
        return found
