"""Attention over packed documents by torch's variable-length kernel, for GPUs in half precision.

One call for every run of this rank's tokens: the queries of each document against the keys from the
document's first token to the run's last one. The kernel aligns queries and keys at their ends, so
that causal and windowed attention need no mask, and skips what nobody sees.

Shape letters: B batch rows, Q queries, K keys, A heads, G key/value groups, E head dim, P packed
tokens, N documents of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.fast_weights.upload import upload
from megatron_ttt.model.attention_plan import AttentionPlan, Stretch

# query [P, A, E], key and value [P, G, E], ends of the documents' queries and keys [N + 1] int32,
# the longest of each; then scale, window_size and enable_gqa by name.
VarlenKernel = Callable[..., Any]


@dataclass(frozen=True)
class PackedSpan:
    """The documents of one run of this rank's tokens, row after row.

    Attributes:
        queries: of this rank, alike in all rows.
        keys_B: each row's keys, at places of the row.
        query_ends, key_ends: ``[N + 1]`` int32, on the device, from 0.
        longest_query, longest_key: tokens.
    """

    queries: slice
    keys_B: tuple[slice, ...]
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def pack(plan: AttentionPlan, device: torch.device) -> tuple[PackedSpan, ...]:
    """Return what the kernel is told about every run of tokens. Uploads, and does not wait."""
    return tuple(_pack(span, plan.batch, device) for span in plan.spans)


def _pack(span: Sequence[Stretch], batch: int, device: torch.device) -> PackedSpan:
    rows = [[s for s in span if s.rows.start <= row < s.rows.stop] for row in range(batch)]
    own = [s for row in rows for s in row]
    queries = [s.queries[1] - s.queries[0] for s in own]
    keys = [s.place + count - s.document for s, count in zip(own, queries, strict=True)]
    ends = [list(accumulate(counts, initial=0)) for counts in (queries, keys)]
    query_ends, key_ends = upload(torch.tensor(ends, dtype=torch.int32), device)
    return PackedSpan(
        slice(rows[0][0].queries[0], rows[0][-1].queries[1]),
        tuple(slice(row[0].document, row[-1].place + _count(row[-1])) for row in rows),
        query_ends,
        key_ends,
        max(queries),
        max(keys),
    )


def _count(stretch: Stretch) -> int:
    return stretch.queries[1] - stretch.queries[0]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packed: Sequence[PackedSpan],
    window: int | None,
    scale: float,
    kernel: VarlenKernel,
) -> Tensor:
    """Attend: ``[B, A, Q, E]``.

    Args:
        query: ``[B, A, Q, E]``.
        key, value: ``[B, G, K, E]``, places 0 to K - 1 of the rows.
        packed: the runs of the queries, of :func:`pack`.
        window: keys that a query sees, its own included; ``None``: all before it.
        scale: of the products.
        kernel: ``torch.nn.attention.varlen.varlen_attn``, or what computes the same.
    """
    batch = query.shape[0]
    left = -1 if window is None else window - 1
    outputs = []
    for span in packed:
        asked = _part(query, span.queries).transpose(1, 2)  # [B, Q, A, E]
        keys, values = (
            _joined(
                [
                    _part(row, seen).squeeze(0).transpose(0, 1)
                    for row, seen in zip(_rows(tensor), span.keys_B, strict=True)
                ]
            )
            for tensor in (key, value)
        )
        found = kernel(
            asked.flatten(0, 1),
            keys,
            values,
            span.query_ends,
            span.key_ends,
            span.longest_query,
            span.longest_key,
            scale=scale,
            window_size=(left, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(found.unflatten(0, (batch, -1)).transpose(1, 2))
    return _joined(outputs, dim=2)


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.split(1) if len(tensor) > 1 else [tensor]


def _part(tensor: Tensor, tokens: slice) -> Tensor:
    """``tensor[:, :, tokens]``; itself where that is all, which costs the backward nothing."""
    if tokens == slice(0, tensor.shape[2]):
        return tensor
    return tensor[:, :, tokens]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
