"""Attention by any kernel that takes a mask, in blocks of queries.

For devices and dtypes without a better kernel (fp32 on a GPU), and for a few queries of rows that
stand at different places. Each block meets only the keys that it can see, so no mask is as large as
the sequence squared; the kernel keeps a block's mask for the backward.

Shape letters: B batch rows, Q queries, K keys, A heads, G key/value groups, E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ttt.model.attention_plan import LARGEST_BLOCK, AttentionPlan, Stretch


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    plan: AttentionPlan,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend: ``[B, A, Q, E]``; queries outside the plan get 0. As ``block_attention``."""
    stretches = [stretch for span in plan.spans for stretch in span]
    if len(stretches) == 1 and stretches[0].rows == slice(0, len(query)):
        (only,) = stretches
        if only.queries == (0, query.shape[2]):
            return _stretch(query, key, value, only, window=window, scale=scale)
    output = torch.zeros_like(query)
    for stretch in stretches:
        rows, queries = stretch.rows, slice(*stretch.queries)
        found = _stretch(
            query[rows, :, queries], key[rows], value[rows], stretch, window=window, scale=scale
        )
        output[rows, :, queries] = found
    return output


def attend_at_places(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    places: Sequence[int],
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend from a few consecutive queries of rows that stand at different places.

    A padding query (beyond the keys, or before the row's first token) gets anything.

    Args:
        query: ``[B, A, Q, E]``.
        key, value: ``[B, G, K, E]``, places 0 to K - 1.
        places: of each row's first query.
        window: keys that a query sees, its own included; ``None``: all before it.
        scale: of the products.
    """
    count = query.shape[2]
    low = 0 if window is None else max(0, min(places) - window + 1)
    high = min(max(places) + count, key.shape[2])
    masks = [
        _visible(place, count, (low, high), window=window, device=query.device) for place in places
    ]
    some = slice(low, high)
    mask = torch.stack(masks)[:, None]
    return _attend(query, key[:, :, some], value[:, :, some], mask, scale=scale)


def _stretch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretch: Stretch,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend from the queries of one stretch, ``[B, A, Q, E]`` of its rows alone."""
    count, place, document = query.shape[2], stretch.place, stretch.document
    reaches = window is None or place + count - document <= window
    if place == document and reaches:
        own = slice(place, place + count)
        return _attend(query, key[:, :, own], value[:, :, own], scale=scale, is_causal=True)
    size = LARGEST_BLOCK if window is None else min(LARGEST_BLOCK, max(64, window))
    outputs = []
    for begin in range(0, count, size):
        end = min(begin + size, count)
        low = document if window is None else max(document, place + begin - window + 1)
        some = slice(low, place + end)
        mask = None
        if end - begin > 1:
            keys = (some.start, some.stop)
            mask = _visible(place + begin, end - begin, keys, window=window, device=query.device)
        outputs.append(
            _attend(query[:, :, begin:end], key[:, :, some], value[:, :, some], mask, scale=scale)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _visible(
    place: int, queries: int, keys: tuple[int, int], *, window: int | None, device: torch.device
) -> Tensor:
    """Whether a query, from ``place`` on, sees a key, of places ``[start, end)``: ``[Q, K]``."""
    key_K = torch.arange(*keys, device=device)
    distance_QK = torch.arange(place, place + queries, device=device)[:, None] - key_K
    mask_QK = distance_QK >= 0
    if window is not None:
        mask_QK &= distance_QK < window
    return mask_QK


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
