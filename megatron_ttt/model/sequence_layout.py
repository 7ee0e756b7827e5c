"""What one micro-batch's rows look like, handed to every layer as an argument.

Megatron passes ``packed_seq_params`` to each layer untouched as long as its format is ``sbhd``. A
:class:`SequenceLayout` is such a record with fields of ours. It is never kept on a module: with
the 1F1B schedule several micro-batches are in flight, each with a layout of its own.

Shape letters: B batch rows, T tokens of a whole row, L tokens of this rank, S spans of a row,
H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.upload import upload
from megatron_ttt.fast_weights.write_rules import TokenInputs, Write
from megatron_ttt.model.attention_plan import AttentionPlan, plan_attention
from megatron_ttt.model.varlen_attention import PackedSpan, pack
from megatron_ttt.parallel.layout import token_ranges, total_spans
from megatron_ttt.parallel.pending import ScanRecord
from megatron_ttt.parallel.scan import SpanExchange
from megatron_ttt.parallel.scan_group import ScanGroup
from megatron_ttt.rule import UpdateRule
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


class ReadingSession(Protocol):
    """What the rows have read before this call, and what this call adds to it (inference).

    ``layer`` counts from 0. Tensors are this tensor-parallel rank's.
    """

    @property
    def writes_fast_weights(self) -> bool:
        """Whether fast weights are read and written; else their layers compute with W0 alone."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Add the call's keys and values ``[L, B, G, E]`` and attend: ``[L, B, A * E]``."""
        ...

    def read_fast_weight(
        self,
        layer: int,
        tokens: TokenInputs,
        weight: Tensor,
        make_write: Callable[[TokenInputs, ChunkPlan, UpdateRule], Write],
    ) -> Tensor:
        """Apply the rows' fast weights to the tokens and write them: outputs ``[B, L, H]``."""
        ...

    def select_hidden(self, hidden_states: Tensor) -> Tensor:
        """Return the positions ``[., B, H]`` out of ``[L, B, H]`` whose logits are wanted."""
        ...


@dataclass
class SequenceLayout(PackedSeqParams):
    """The layout of one micro-batch on one rank.

    Attributes:
        length: tokens of a whole row, T.
        ranges: this rank's token ranges ``[start, end)`` in memory order (zigzag: two).
        order: how spans are dealt to context-parallel ranks.
        positions: ``[B or 1, L]`` rotary position of each local token.
        attention: what this rank's queries see; ``None`` in a session, which has its own.
        packed: the same for the variable-length kernel; on a GPU alone.
        plan: chunk plan of this rank's tokens; ``None`` without fast weights.
        exchange: joins the states of the row's ranks; it knows the keep of every span of the
            whole row, which is therefore never exchanged. ``None`` at cp = 1.
        embeddings: the input embeddings as an autograd leaf ``[L or L/tp, B, H]``, set by the
            model where targets come from them.
        wants_norms: whether layers fill ``state_squares``.
        eta_factor: share of the rule's eta that layers compute with.
        state_squares: per layer (from 0) ``[B, chunks]``, squared Frobenius norm of the local
            shard of the state that enters each local chunk; filled while the layers run.
        carries: per layer ``[S, B, H, F]``, the states that entered this rank's spans, kept from
            the first forward of a recomputed layer to its second.
        scans: one record per scan that was waited for.
        session: what the rows have read before, in inference; ``plan`` is then ``None``.
    """

    length: int = 0
    ranges: Sequence[tuple[int, int]] = ()
    order: SequenceOrder = SequenceOrder.zigzag
    positions: Tensor | None = None
    attention: AttentionPlan | None = None
    packed: Sequence[PackedSpan] = ()
    plan: ChunkPlan | None = None
    exchange: SpanExchange | None = None
    embeddings: Tensor | None = None
    wants_norms: bool = True
    eta_factor: float = 1.0
    state_squares: dict[int, Tensor] = field(default_factory=dict)
    carries: dict[int, Tensor] = field(default_factory=dict)
    scans: list[ScanRecord] = field(default_factory=list)
    session: ReadingSession | None = None


def take_ranges(rows: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """``[B, T]`` whole rows -> ``[B, L]``, the given token ranges one after another."""
    if len(ranges) == 1:
        ((start, end),) = ranges
        return rows[:, start:end]
    return torch.cat([rows[:, start:end] for start, end in ranges], dim=1)


def places_in_documents(document_starts: Tensor) -> Tensor:
    """``[B, T]`` bool -> ``[B, T]`` int64: each token's place in its document, from 0."""
    places = torch.arange(document_starts.shape[1])
    return places - torch.where(document_starts, places, 0).cummax(dim=1).values


@dataclass(frozen=True)
class ScanSettings:
    """How states travel between the ranks of a row: see ``parallel/scan.py``."""

    group: ScanGroup
    order: SequenceOrder
    algorithm: ScanAlgorithm
    message_dtype: torch.dtype | None


def sequence_layout(
    *,
    document_starts: Tensor,
    padding: Tensor,
    chunk_size: int | None,
    decay: float,
    mask_attention: bool,
    window: int | None,
    reset_positions: bool,
    reset_fast_weights: bool,
    scan: ScanSettings,
    device: torch.device,
    wants_norms: bool = True,
    eta_factor: float = 1.0,
) -> SequenceLayout:
    """Return the layout of a micro-batch for one context-parallel rank, from its whole rows.

    Everything is decided on whole rows and then sliced: a span's first token starts no document.

    Args:
        document_starts, padding: ``[B, T]`` bool, whole rows, on the CPU: the plan is made of
            integers, and reading them back from a device would wait for it.
        chunk_size: C; ``None`` where the model has no fast weights.
        decay: gamma per chunk.
        mask_attention, reset_positions, reset_fast_weights: what a document boundary does.
        window: of attention.
        scan: the ranks that share the row, and this one's place among them.
        device: where the layout's tensors go.
        wants_norms: whether layers note the norms of their states.
        eta_factor: share of the rule's eta that layers compute with.
    """
    batch, length = document_starts.shape
    ranges: Sequence[tuple[int, int]] = [(0, length)]  # cp = 1: one run of any length
    ranks = scan.group.ranks
    if ranks > 1:
        ranges = token_ranges(scan.group.rank, ranks, scan.order, length)
    positions = torch.arange(length)[None]
    if reset_positions:
        positions = places_in_documents(document_starts)
    plan = exchange = None
    if chunk_size is not None:
        plan = plan_chunks(
            document_starts if reset_fast_weights else None,
            batch=batch,
            length=length,
            chunk_size=chunk_size,
            decay=decay,
            padding_BT=padding,
            device=device,
        )
        if ranks > 1:
            exchange = _exchange(plan, scan)
            plan = plan.select_tokens(ranges)
    starts = document_starts if mask_attention else None
    attention = plan_attention(starts, batch=batch, ranges=ranges)
    is_plain = attention.is_causal(length // ranks, window)
    return SequenceLayout(
        qkv_format="sbhd",
        # Transformer Engine multiplies them by cp
        max_seqlen_q=length // ranks,
        max_seqlen_kv=length // ranks,
        length=length,
        ranges=ranges,
        order=scan.order,
        positions=upload(take_ranges(positions, ranges), device),
        attention=attention,
        packed=() if is_plain or device.type == "cpu" else pack(attention, device),
        plan=plan,
        exchange=exchange,
        wants_norms=wants_norms,
        eta_factor=eta_factor,
    )


def _exchange(whole_rows: ChunkPlan, scan: ScanSettings) -> SpanExchange:
    """Return a micro-batch's exchange; every rank knows all keeps from the whole rows."""
    spans = total_spans(scan.group.ranks, scan.order)
    # From the plan's integers, not its tensors: those may lie on a device that is busy.
    keeps_NB = torch.tensor([blocks.keeps for blocks in whole_rows.blocks], dtype=torch.float64)
    return SpanExchange(
        keeps_NB.unflatten(0, (spans, -1)).prod(dim=1),
        order=scan.order,
        group=scan.group,
        algorithm=scan.algorithm,
        comm_dtype=scan.message_dtype,
    )
