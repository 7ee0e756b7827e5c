"""Causal attention against keys held whole: windowed, by document, rows at places of their own.

Queries are worked off in blocks, each against only the keys it can see, so a sliding window costs
what it should and no mask is ever as large as the sequence squared. Masks are made where the
queries are. Queries that see everything before them, from the row's first token on, need none:
they go to the fused causal kernel whole.

Shape letters: B batch rows, T tokens of a whole row, Q queries, K keys, A heads, G key/value
groups, E head dim.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 64


def block_size(window: int | None) -> int:
    """Return how many queries are worked off together: about a window of them."""
    if window is None:
        return LARGEST_BLOCK
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, window))


def blocks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut the token range ``[start, end)`` into blocks of at most ``size``."""
    for first in range(start, end, size):
        yield first, min(first + size, end)


def visible(
    first: Sequence[int],
    queries: int,
    keys: tuple[int, int],
    *,
    window: int | None,
    documents: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees: ``[B or 1, 1, Q, K]`` bool.

    A query at place p sees key q when ``p - window < q <= p`` and both belong to the same document.

    Args:
        first: place of each row's first query; one number where rows are alike.
        queries: Q, at consecutive places.
        keys: their places ``[start, end)``.
        window: tokens a query sees, itself included; ``None``: all before it.
        documents: ``[B, T]`` document of each token, or ``None``; only with rows alike.
        device: of the mask.
    """
    key_K = torch.arange(*keys, device=device)
    distances = [
        torch.arange(start, start + queries, device=device)[:, None] - key_K for start in first
    ]
    distance = distances[0][None] if len(distances) == 1 else torch.stack(distances)
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[:, None]
    if documents is not None:
        (start,) = first
        same = documents[:, start : start + queries, None] == documents[:, None, slice(*keys)]
        mask = mask & same[:, None]
    return mask


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: Sequence[int],
    window: int | None,
    documents: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Attend from consecutive queries to the keys of the row: ``[B, A, Q, E]``.

    Args:
        query: ``[B, A, Q, E]``.
        key, value: ``[B, G, K, E]``, of the places 0 to K - 1. A query beyond them (padding) sees
            all that its window holds of them.
        first, window, documents: as of :func:`visible`.
        scale: of the products.
    """
    count, held = query.shape[2], key.shape[2]
    sees_all = documents is None and (window is None or window >= held)
    if sees_all and list(first) == [0] and count <= held:
        return _attend(query, key[:, :, :count], value[:, :, :count], scale=scale, is_causal=True)
    outputs = []
    for begin, end in blocks(0, count, block_size(window)):
        high = min(max(first) + end, held)
        low = 0 if window is None else max(0, min(first) + begin - window + 1)
        mask = None
        if documents is not None or len(first) > 1 or end - begin > 1:
            places = [start + begin for start in first]
            mask = visible(
                places,
                end - begin,
                (low, high),
                window=window,
                documents=documents,
                device=query.device,
            )
        some = slice(low, high)
        outputs.append(
            _attend(query[:, :, begin:end], key[:, :, some], value[:, :, some], mask, scale=scale)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


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
