"""The fast weights of one layer while sequences are read: prefill, decoding, flush.

    apply   o_t = (W0 + eta * S) z_t                     S of the row's last complete chunk
    write   S = gamma * S + clip(V^T Z)                  once, when a chunk's C tokens are complete

The semantics are those of training (``fast_weights/reference.py``): keys and target sources of the
unfinished chunk are kept, and one product writes them when it completes, because the target's
convolution looks ahead inside the chunk. Nothing is computed twice; ``W0 + eta * S`` is held per
row in compute dtype and rebuilt only after a write. Inference only: no gradients.
In-Place TTT (arXiv 2604.06169) section 3; inference, rows and padding: docs/inference.md.

Shape suffixes: B batch rows, R some of the rows, T tokens of a call, C chunk size, P tokens of an
unfinished chunk, D hidden, F ffn (the local shard under tensor parallelism), H width of the target
source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import itemgetter

import torch
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.exchange import CarryExchange
from megatron_ttt.fast_weights.scale import squares, update_ratio
from megatron_ttt.fast_weights.update import fast_weight_scan, written_state
from megatron_ttt.fast_weights.write_rules import TokenInputs, Write
from megatron_ttt.inference.token_runs import TokenRuns, equal_rows
from megatron_ttt.rule import UpdateRule

MakeWrite = Callable[[TokenInputs, ChunkPlan, UpdateRule], Write]


class Unfinished(StrEnum):
    """What becomes of the unfinished chunk when a memory is taken."""

    FLUSH = "flush"  # written as if its chunk ended there
    DROP = "drop"  # forgotten


@dataclass(frozen=True)
class LayerTensors:
    """What a layer needs for one call.

    ``tokens``: of the call. ``weight_DF``: W0, compute dtype. ``make_write``: ``(some tokens, their
    plan, the rule) -> what they write``; collective under tensor parallelism: every rank of the
    group reads the same rows.
    """

    tokens: TokenInputs
    weight_DF: Tensor
    make_write: MakeWrite


@dataclass(frozen=True)
class ContextSpans:
    """The part of a call that one rank of a context-parallel group holds.

    ``plan``: of its ``count`` spans, in memory order. ``has_first``: the row's first span is among
    them. ``share_last``: gives every rank the tensor of the one that holds the row's last span.
    ``length``: tokens of the whole call, the same in every row.
    """

    plan: ChunkPlan
    count: int
    exchange: CarryExchange
    has_first: bool
    share_last: Callable[[Tensor], Tensor]
    length: int


class FastWeightState:
    """One layer's fast weights for a batch of rows. See the module's lines.

    ``places[b]`` is the number of real tokens row ``b`` has read, ``pending[b]`` how many of them
    wait in its unfinished chunk.
    """

    def __init__(self, rule: UpdateRule, *, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"batch {batch} must be at least 1")
        self.rule = rule
        self.places = [0] * batch
        self.pending = [0] * batch
        self.state_BDF: Tensor | None = None  # None: zero in every row
        self._effective_BDF: Tensor | None = None  # W0 + eta * S; None: W0, or not yet built
        self._kept: TokenInputs | None = None  # room for a chunk of every row

    @property
    def batch(self) -> int:
        return len(self.places)

    @torch.no_grad()
    def read(self, layer: LayerTensors, runs: TokenRuns) -> Tensor:
        """Apply the fast weight to a call's tokens and write the chunks they complete.

        Args:
            layer: this call's keys, sources and W0.
            runs: which tokens of each row are real. Others take no place and come back zero.

        Returns:
            ``[B, T, D]`` in compute dtype (partial over tensor-parallel ranks).

        Raises:
            ValueError: another number of rows than before.
        """
        if runs.batch != self.batch:
            raise ValueError(f"{runs.batch} rows cannot continue a state of {self.batch}")
        assert layer.tokens.keys_BTF.shape[:2] == (runs.batch, runs.length)
        self._reserve(layer)
        if runs.length == 1:
            outputs_BTD = self._read_one(layer, runs)
        else:
            outputs_BTD = self._read_runs(layer, runs)
        self.places = [place + count for place, count in zip(self.places, runs.count, strict=True)]
        return outputs_BTD

    @torch.no_grad()
    def read_spans(self, layer: LayerTensors, spans: ContextSpans) -> Tensor:
        """Whole chunks of every row, dealt to the ranks of a context-parallel group.

        Args:
            layer: of this rank's tokens, in memory order.
            spans: whose tokens they are.

        Returns:
            Outputs of this rank's tokens. Every rank's state is then the row's.

        Raises:
            ValueError: a row has an unfinished chunk.
        """
        if any(self.pending):
            raise ValueError(f"{max(self.pending)} tokens wait in an unfinished chunk")
        output = fast_weight_scan(
            layer.tokens.keys_BTF,
            layer.make_write(layer.tokens, spans.plan, self.rule),
            layer.weight_DF,
            plan=spans.plan,
            eta=self.rule.eta,
            spans=spans.count,
            exchange=spans.exchange,
            carry_BDF=self.state_BDF if spans.has_first else None,
            group_chunks=1,  # as a decoder writes: their states are equal bit by bit
        )
        self._take(list(range(self.batch)), spans.share_last(output.state_BDF), layer.weight_DF)
        self.places = [place + spans.length for place in self.places]
        return output.outputs_BTD

    @torch.no_grad()
    def flush(self, weight_DF: Tensor, make_write: MakeWrite) -> None:
        """Write every row's unfinished chunk now; the chunk grid starts anew behind it.

        Args:
            weight_DF: W0.
            make_write: as in ``LayerTensors``.
        """
        if self._kept is None:
            return
        layer = LayerTensors(self._kept, weight_DF, make_write)
        for rows in equal_rows([(pending,) for pending in self.pending]):
            if self.pending[rows[0]]:
                self._write(rows, layer)

    def select(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was: beam reorder, repeat and select."""
        if list(rows) == list(range(self.batch)):
            return
        self.places = [self.places[row] for row in rows]
        self.pending = [self.pending[row] for row in rows]

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, torch.tensor(list(rows), device=tensor.device))

        if self.state_BDF is not None:
            self.state_BDF = chosen(self.state_BDF)
        if self._effective_BDF is not None:
            self._effective_BDF = chosen(self._effective_BDF)
        if self._kept is not None:
            self._kept = self._kept.map(chosen)

    def repeat(self, times: int) -> None:
        """Each row ``times`` times, repeats next to each other."""
        self.select([row for row in range(self.batch) for _ in range(times)])

    def unfinished(self) -> TokenInputs | None:
        """Return the tokens that wait, ``[B, P, ...]``, P the longest row's; or None."""
        longest = max(self.pending)
        if self._kept is None or longest == 0:
            return None
        return self._kept.map(lambda kept: kept[:, :longest])

    def restore(
        self,
        *,
        places: Sequence[int],
        pending: Sequence[int],
        state_BDF: Tensor | None,
        unfinished: TokenInputs | None,
    ) -> None:
        """Continue from what ``places``, ``pending``, ``state_BDF`` and ``unfinished`` once were.

        Tensors are taken over, not copied, except the unfinished chunk.
        """
        assert len(places) == len(pending) == self.batch
        assert all(0 <= waiting < self.rule.chunk_size for waiting in pending)
        self.places, self.pending = list(places), list(pending)
        self.state_BDF, self._effective_BDF = state_BDF, None
        self._kept = None
        if unfinished is not None:
            length = unfinished.keys_BTF.shape[1]
            self._kept = unfinished.map(self._buffer)
            for kept, waiting in zip(self._kept, unfinished, strict=True):
                kept[:, :length] = waiting

    def update_ratios(self, weight_DF: Tensor) -> Tensor:
        """``norm(eta * S) / norm(W0)`` of each row, ``[B]``."""
        if self.state_BDF is None:
            return torch.zeros(self.batch, device=weight_DF.device)
        return update_ratio(squares(self.state_BDF), squares(weight_DF[None]), eta=self.rule.eta)

    def _buffer(self, like_BTX: Tensor) -> Tensor:
        return like_BTX.new_empty(self.batch, self.rule.chunk_size, like_BTX.shape[2])

    def _reserve(self, layer: LayerTensors) -> None:
        if self._kept is None:
            self._kept = layer.tokens.map(self._buffer)
        if self.state_BDF is not None and self._effective_BDF is None:
            self._rebuild(list(range(self.batch)), layer.weight_DF)

    def _read_one(self, layer: LayerTensors, runs: TokenRuns) -> Tensor:
        """One token a row: one batched product, and one place of the buffer a row."""
        keys_BTF = layer.tokens.keys_BTF
        if self._effective_BDF is None:
            outputs_BTD = torch.nn.functional.linear(keys_BTF, layer.weight_DF)
        else:
            outputs_BTD = torch.bmm(keys_BTF, self._effective_BDF.mT)
        rows = [row for row, count in enumerate(runs.count) if count]
        some = self._of_rows(rows)
        self._append(rows, layer.tokens.map(lambda tokens: tokens[some]))
        complete = [row for row in rows if self.pending[row] == self.rule.chunk_size]
        if complete:
            self._write(complete, layer)
        return outputs_BTD

    def _read_runs(self, layer: LayerTensors, runs: TokenRuns) -> Tensor:
        hidden = layer.weight_DF.shape[0]
        outputs_BTD = layer.tokens.keys_BTF.new_zeros(runs.batch, runs.length, hidden)
        for rows in equal_rows(list(zip(runs.first, runs.count, self.pending, strict=True))):
            first, count = runs.first[rows[0]], runs.count[rows[0]]
            if count:
                there = (self._of_rows(rows), slice(first, first + count))
                tokens = layer.tokens.map(itemgetter(there))
                outputs_BTD[there] = self._read_run(rows, tokens, layer)
        return outputs_BTD

    def _read_run(self, rows: list[int], tokens: TokenInputs, layer: LayerTensors) -> Tensor:
        """Rows with equally many waiting and new tokens: end the chunk, whole chunks, the rest."""
        chunk_size, length = self.rule.chunk_size, tokens.keys_BTF.shape[1]
        waiting = self.pending[rows[0]]
        head = min(length, chunk_size - waiting) if waiting else 0
        body = head + (length - head) // chunk_size * chunk_size
        outputs = []
        if head:
            some = tokens.map(lambda tensor: tensor[:, :head])
            outputs.append(self._apply(rows, some.keys_BTF, layer.weight_DF))
            self._append(rows, some)
            if waiting + head == chunk_size:
                self._write(rows, layer)
        if body > head:
            some = tokens.map(lambda tensor: tensor[:, head:body])
            outputs.append(self._read_chunks(rows, some, layer))
        if length > body:
            some = tokens.map(lambda tensor: tensor[:, body:])
            outputs.append(self._apply(rows, some.keys_BTF, layer.weight_DF))
            self._append(rows, some)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _read_chunks(self, rows: list[int], tokens: TokenInputs, layer: LayerTensors) -> Tensor:
        """Whole chunks, by the very code that trains."""
        plan = plan_chunks(
            None,
            batch=len(rows),
            length=tokens.keys_BTF.shape[1],
            chunk_size=self.rule.chunk_size,
            decay=self.rule.decay,
            device=tokens.keys_BTF.device,
        )
        output = fast_weight_scan(
            tokens.keys_BTF,
            layer.make_write(tokens, plan, self.rule),
            layer.weight_DF,
            plan=plan,
            eta=self.rule.eta,
            carry_BDF=None if self.state_BDF is None else self.state_BDF[self._of_rows(rows)],
            group_chunks=1,  # as a decoder writes
        )
        self._take(rows, output.state_BDF, layer.weight_DF)
        return output.outputs_BTD

    def _apply(self, rows: list[int], keys_RTF: Tensor, weight_DF: Tensor) -> Tensor:
        if self._effective_BDF is None:
            return torch.nn.functional.linear(keys_RTF, weight_DF)
        # One row at a time: a row's matrix is far larger than its tokens, so none is copied.
        parts = [
            torch.nn.functional.linear(keys_TF, self._effective_BDF[row])
            for row, keys_TF in zip(rows, keys_RTF, strict=True)
        ]
        return torch.stack(parts)

    def _append(self, rows: list[int], tokens: TokenInputs) -> None:
        """Keep tokens of ``rows``: several at once only where equally many wait in each row."""
        assert self._kept is not None
        count = tokens.keys_BTF.shape[1]
        waiting = [self.pending[row] for row in rows]
        for kept, new in zip(self._kept, tokens, strict=True):
            if len(set(waiting)) == 1:
                kept[self._of_rows(rows), waiting[0] : waiting[0] + count] = new
            elif rows:
                assert count == 1
                kept[rows, waiting] = new[:, 0]
        for row in rows:
            self.pending[row] += count

    def _of_rows(self, rows: list[int]) -> slice | list[int]:
        """Index of ``rows`` (ascending): a view where that is all of them, else a copy."""
        return slice(None) if len(rows) == self.batch else rows

    def _write(self, rows: list[int], layer: LayerTensors) -> None:
        """Write the waiting tokens of ``rows`` (equally many) and start their next chunk."""
        assert self._kept is not None
        waiting, some = self.pending[rows[0]], self._of_rows(rows)
        tokens = self._kept.map(lambda kept: kept[some, :waiting])
        plan = plan_chunks(
            None,
            batch=len(rows),
            length=waiting,
            chunk_size=waiting,
            decay=self.rule.decay,
            device=tokens.keys_BTF.device,
        )
        if self.state_BDF is None:
            self._zero(layer.weight_DF)
        assert self.state_BDF is not None
        state_RDF = written_state(
            self.state_BDF[some],
            tokens.keys_BTF,
            layer.make_write(tokens, plan, self.rule),
            layer.weight_DF,
            plan=plan,
        )
        self._take(rows, state_RDF, layer.weight_DF)
        for row in rows:
            self.pending[row] = 0

    def _zero(self, weight_DF: Tensor) -> None:
        self.state_BDF = weight_DF.new_zeros(
            self.batch, *weight_DF.shape, dtype=state_dtype(weight_DF.dtype)
        )

    def _take(self, rows: list[int], state_RDF: Tensor, weight_DF: Tensor) -> None:
        if len(rows) == self.batch:
            self.state_BDF = state_RDF
        else:
            if self.state_BDF is None:
                self._zero(weight_DF)
            assert self.state_BDF is not None
            self.state_BDF[rows] = state_RDF
        self._rebuild(rows, weight_DF)

    def _rebuild(self, rows: list[int], weight_DF: Tensor) -> None:
        """``W0 + eta * S``, rounded to compute dtype exactly as training rounds it."""
        assert self.state_BDF is not None
        if self._effective_BDF is None:
            self._effective_BDF = weight_DF.repeat(self.batch, 1, 1)
        eta = self.rule.eta
        for row in rows:
            torch.add(weight_DF, self.state_BDF[row], alpha=eta, out=self._effective_BDF[row])
