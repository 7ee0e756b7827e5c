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

import torch
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import state_dtype
from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.scale import Clip, Normalize, ReduceSums
from megatron_ttt.fast_weights.sweeps import CarryExchange
from megatron_ttt.fast_weights.update import fast_weight_spans, flush
from megatron_ttt.inference.token_runs import TokenRuns, equal_rows

MakeTargets = Callable[[Tensor, ChunkPlan], Tensor]


class Unfinished(StrEnum):
    """What becomes of the unfinished chunk when a memory is taken."""

    FLUSH = "flush"  # written as if its chunk ended there
    DROP = "drop"  # forgotten


@dataclass(frozen=True)
class UpdateRule:
    """How a layer writes: chunk size C, eta, gamma, clip and normalisation."""

    chunk_size: int
    learning_rate: float
    decay: float = 1.0
    clip: Clip | None = None
    normalize: Normalize = Normalize.NONE


@dataclass(frozen=True)
class LayerTensors:
    """What a layer needs for one call.

    ``keys_BTF`` and ``weight_DF``: Z and W0, compute dtype. ``source_BTH``: U. ``make_targets``:
    ``(U of some rows, their plan) -> V``; collective under tensor parallelism, like
    ``reduce_sums`` (see ``fast_weight_linear``): every rank of the group reads the same rows.
    """

    keys_BTF: Tensor
    source_BTH: Tensor
    weight_DF: Tensor
    make_targets: MakeTargets
    reduce_sums: ReduceSums | None = None


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
        self._keys_BCF: Tensor | None = None
        self._source_BCH: Tensor | None = None

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
        assert layer.keys_BTF.shape[:2] == (runs.batch, runs.length)
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
        output = fast_weight_spans(
            layer.keys_BTF,
            layer.make_targets(layer.source_BTH, spans.plan),
            layer.weight_DF,
            plan=spans.plan,
            learning_rate=self.rule.learning_rate,
            spans=spans.count,
            exchange=spans.exchange,
            carry_BDF=self.state_BDF if spans.has_first else None,
            clip=self.rule.clip,
            normalize=self.rule.normalize,
            reduce_sums=layer.reduce_sums,
        )
        self._take(list(range(self.batch)), spans.share_last(output.state_BDF), layer.weight_DF)
        self.places = [place + spans.length for place in self.places]
        return output.outputs_BTD

    @torch.no_grad()
    def flush(
        self,
        weight_DF: Tensor,
        make_targets: MakeTargets,
        *,
        reduce_sums: ReduceSums | None = None,
    ) -> None:
        """Write every row's unfinished chunk now; the chunk grid starts anew behind it.

        Args:
            weight_DF: W0.
            make_targets, reduce_sums: as in ``LayerTensors``.
        """
        if self._keys_BCF is None or self._source_BCH is None:
            return
        layer = LayerTensors(self._keys_BCF, self._source_BCH, weight_DF, make_targets, reduce_sums)
        for rows in equal_rows([(pending,) for pending in self.pending]):
            if self.pending[rows[0]]:
                self._write(rows, layer)

    def select(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was: beam reorder, repeat and select."""
        if list(rows) == list(range(self.batch)):
            return
        self.places = [self.places[row] for row in rows]
        self.pending = [self.pending[row] for row in rows]
        for name in ("state_BDF", "_effective_BDF", "_keys_BCF", "_source_BCH"):
            tensor = getattr(self, name)
            if tensor is not None:
                index = torch.tensor(list(rows), device=tensor.device)
                setattr(self, name, tensor.index_select(0, index))

    def repeat(self, times: int) -> None:
        """Each row ``times`` times, repeats next to each other."""
        self.select([row for row in range(self.batch) for _ in range(times)])

    def unfinished(self) -> tuple[Tensor, Tensor] | None:
        """Keys ``[B, P, F]`` and sources ``[B, P, H]`` that wait, P the longest row's; or None."""
        longest = max(self.pending)
        if self._keys_BCF is None or self._source_BCH is None or longest == 0:
            return None
        return self._keys_BCF[:, :longest], self._source_BCH[:, :longest]

    def restore(
        self,
        *,
        places: Sequence[int],
        pending: Sequence[int],
        state_BDF: Tensor | None,
        unfinished: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Continue from what ``places``, ``pending``, ``state_BDF`` and ``unfinished`` once were.

        Tensors are taken over, not copied, except the unfinished chunk.
        """
        assert len(places) == len(pending) == self.batch
        assert all(0 <= waiting < self.rule.chunk_size for waiting in pending)
        self.places, self.pending = list(places), list(pending)
        self.state_BDF, self._effective_BDF = state_BDF, None
        self._keys_BCF = self._source_BCH = None
        if unfinished is not None:
            keys_BPF, source_BPH = unfinished
            self._keys_BCF = self._buffer(keys_BPF)
            self._source_BCH = self._buffer(source_BPH)
            self._keys_BCF[:, : keys_BPF.shape[1]] = keys_BPF
            self._source_BCH[:, : source_BPH.shape[1]] = source_BPH

    def update_ratios(self, weight_DF: Tensor) -> Tensor:
        """``norm(eta * S) / norm(W0)`` of each row, ``[B]``."""
        if self.state_BDF is None:
            return torch.zeros(self.batch, device=weight_DF.device)
        norm_B = torch.linalg.vector_norm(self.state_BDF.flatten(1), dim=1)
        slow = torch.linalg.vector_norm(weight_DF, dtype=norm_B.dtype)
        return abs(self.rule.learning_rate) * norm_B / slow

    def _buffer(self, like_BTX: Tensor) -> Tensor:
        return like_BTX.new_empty(self.batch, self.rule.chunk_size, like_BTX.shape[2])

    def _reserve(self, layer: LayerTensors) -> None:
        if self._keys_BCF is None:
            self._keys_BCF = self._buffer(layer.keys_BTF)
            self._source_BCH = self._buffer(layer.source_BTH)
        if self.state_BDF is not None and self._effective_BDF is None:
            self._rebuild(list(range(self.batch)), layer.weight_DF)

    def _read_one(self, layer: LayerTensors, runs: TokenRuns) -> Tensor:
        """One token a row: one batched product, and one place of the buffer a row."""
        if self._effective_BDF is None:
            outputs_BTD = torch.nn.functional.linear(layer.keys_BTF, layer.weight_DF)
        else:
            outputs_BTD = torch.bmm(layer.keys_BTF, self._effective_BDF.mT)
        rows = [row for row, count in enumerate(runs.count) if count]
        some = self._of_rows(rows)
        self._append(rows, layer.keys_BTF[some], layer.source_BTH[some])
        complete = [row for row in rows if self.pending[row] == self.rule.chunk_size]
        if complete:
            self._write(complete, layer)
        return outputs_BTD

    def _read_runs(self, layer: LayerTensors, runs: TokenRuns) -> Tensor:
        hidden = layer.weight_DF.shape[0]
        outputs_BTD = layer.keys_BTF.new_zeros(runs.batch, runs.length, hidden)
        for rows in equal_rows(list(zip(runs.first, runs.count, self.pending, strict=True))):
            first, count = runs.first[rows[0]], runs.count[rows[0]]
            if count:
                some = self._of_rows(rows)
                tokens = slice(first, first + count)
                outputs_BTD[some, tokens] = self._read_run(
                    rows, layer.keys_BTF[some, tokens], layer.source_BTH[some, tokens], layer
                )
        return outputs_BTD

    def _read_run(
        self, rows: list[int], keys_RTF: Tensor, source_RTH: Tensor, layer: LayerTensors
    ) -> Tensor:
        """Rows with equally many waiting and new tokens: end the chunk, whole chunks, the rest."""
        chunk_size, length = self.rule.chunk_size, keys_RTF.shape[1]
        waiting = self.pending[rows[0]]
        head = min(length, chunk_size - waiting) if waiting else 0
        body = head + (length - head) // chunk_size * chunk_size
        outputs = []
        if head:
            outputs.append(self._apply(rows, keys_RTF[:, :head], layer.weight_DF))
            self._append(rows, keys_RTF[:, :head], source_RTH[:, :head])
            if waiting + head == chunk_size:
                self._write(rows, layer)
        if body > head:
            whole = slice(head, body)
            outputs.append(self._read_chunks(rows, keys_RTF[:, whole], source_RTH[:, whole], layer))
        if length > body:
            outputs.append(self._apply(rows, keys_RTF[:, body:], layer.weight_DF))
            self._append(rows, keys_RTF[:, body:], source_RTH[:, body:])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _read_chunks(
        self, rows: list[int], keys_RTF: Tensor, source_RTH: Tensor, layer: LayerTensors
    ) -> Tensor:
        """Whole chunks, by the very code that trains."""
        plan = plan_chunks(
            None,
            batch=len(rows),
            length=keys_RTF.shape[1],
            chunk_size=self.rule.chunk_size,
            decay=self.rule.decay,
            device=keys_RTF.device,
        )
        output = fast_weight_spans(
            keys_RTF,
            layer.make_targets(source_RTH, plan),
            layer.weight_DF,
            plan=plan,
            learning_rate=self.rule.learning_rate,
            carry_BDF=None if self.state_BDF is None else self.state_BDF[self._of_rows(rows)],
            clip=self.rule.clip,
            normalize=self.rule.normalize,
            reduce_sums=layer.reduce_sums,
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

    def _append(self, rows: list[int], keys_RTF: Tensor, source_RTH: Tensor) -> None:
        """Keep tokens of ``rows``: several at once only where equally many wait in each row."""
        assert self._keys_BCF is not None and self._source_BCH is not None
        count = keys_RTF.shape[1]
        waiting = [self.pending[row] for row in rows]
        if len(set(waiting)) == 1:
            there = (self._of_rows(rows), slice(waiting[0], waiting[0] + count))
            self._keys_BCF[there] = keys_RTF
            self._source_BCH[there] = source_RTH
        elif rows:
            assert count == 1
            self._keys_BCF[rows, waiting] = keys_RTF[:, 0]
            self._source_BCH[rows, waiting] = source_RTH[:, 0]
        for row in rows:
            self.pending[row] += count

    def _of_rows(self, rows: list[int]) -> slice | list[int]:
        """Index of ``rows`` (ascending): a view where that is all of them, else a copy."""
        return slice(None) if len(rows) == self.batch else rows

    def _write(self, rows: list[int], layer: LayerTensors) -> None:
        """Write the waiting tokens of ``rows`` (equally many) and start their next chunk."""
        assert self._keys_BCF is not None and self._source_BCH is not None
        waiting = self.pending[rows[0]]
        keys_RPF = self._keys_BCF[self._of_rows(rows), :waiting]
        plan = plan_chunks(
            None, batch=len(rows), length=waiting, chunk_size=waiting, device=keys_RPF.device
        )
        if self.state_BDF is None:
            self._zero(layer.weight_DF)
        assert self.state_BDF is not None
        state_RDF = flush(
            self.state_BDF[self._of_rows(rows)],
            keys_RPF,
            layer.make_targets(self._source_BCH[self._of_rows(rows), :waiting], plan),
            layer.weight_DF,
            learning_rate=self.rule.learning_rate,
            decay=self.rule.decay,
            clip=self.rule.clip,
            normalize=self.rule.normalize,
            reduce_sums=layer.reduce_sums,
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
        eta = self.rule.learning_rate
        for row in rows:
            torch.add(weight_DF, self.state_BDF[row], alpha=eta, out=self._effective_BDF[row])
