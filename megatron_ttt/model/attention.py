"""Scaled-dot-product attention on any device: causal, windowed, by document, across CP ranks.

The ``torch`` backend's core attention. Keys and values are gathered over the context-parallel
group (grouped queries keep them small); queries stay where they are and are worked off in blocks,
each against only the keys it can see, so a sliding window costs what it should and no mask is ever
as large as the sequence squared.

Shape letters: B batch rows, T tokens of a whole row, L tokens of this rank, Q queries of a block,
K keys of a block, A heads, G key/value groups, E head dim.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.parallel.collectives import gather_sequences

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 64


def block_size(window: int | None) -> int:
    """Queries worked off together: about a window, of which a block then wastes at most half."""
    if window is None:
        return LARGEST_BLOCK
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, window))


def blocks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut the token range ``[start, end)`` into blocks of at most ``size``."""
    for first in range(start, end, size):
        yield first, min(first + size, end)


def visible(
    queries: tuple[int, int], keys: tuple[int, int], window: int | None, documents: Tensor | None
) -> Tensor:
    """Which keys each query sees: ``[B or 1, 1, Q, K]`` bool.

    A query at global position p sees key q when ``p - window < q <= p`` and both belong to the
    same document.

    Args:
        queries, keys: global token ranges ``[start, end)``.
        window: tokens a query sees, itself included; ``None``: all before it.
        documents: ``[B, T]`` document of each token, or ``None``.
    """
    device = documents.device if documents is not None else None
    distance = torch.arange(*queries, device=device)[:, None] - torch.arange(*keys, device=device)
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[None, None]
    if documents is not None:
        same = documents[:, slice(*queries), None] == documents[:, None, slice(*keys)]
        mask = mask & same[:, None]
    return mask


class TorchAttention(MegatronModule):
    """Megatron core attention over ``torch``'s fused kernels; see the module's first lines.

    Takes queries ``[L, B, A, E]``, keys and values ``[L, B, G, E]`` (local, memory order, this
    tensor-parallel rank's heads) and a :class:`SequenceLayout` as ``packed_seq_params``; returns
    ``[L, B, A * E]``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        assert pg_collection is not None
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout={dropout}: the torch backend has no dropout")
        self.layer = layer_number - 1
        self.cp_group = pg_collection.cp
        self.window = config.window_size[0] + 1 if config.window_size is not None else None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
    ) -> Tensor:
        """Attend within the row; see the class."""
        layout = packed_seq_params
        assert layout is not None, "the torch backend needs the micro-batch's layout"
        if layout.session is not None:
            return layout.session.attend(
                self.layer, query, key, value, window=self.window, scale=self.scale
            )
        key, value = gather_sequences(key, value, group=self.cp_group, order=layout.order)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        outputs, offset = [], 0
        for start, end in layout.ranges:
            for first, last in blocks(start, end, block_size(self.window)):
                place = offset + first - start
                queries = query[:, :, place : place + last - first]
                outputs.append(self._block(queries, key, value, (first, last), layout.documents))
            offset += end - start
        attended = torch.cat(outputs, dim=2)
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _block(
        self,
        queries: Tensor,
        key: Tensor,
        value: Tensor,
        positions: tuple[int, int],
        documents: Tensor | None,
    ) -> Tensor:
        """One block of queries ``[B, A, Q, E]`` against the keys it can see."""
        first, last = positions
        earliest = 0 if self.window is None else max(0, first - self.window + 1)
        mask = visible(positions, (earliest, last), self.window, documents)
        return F.scaled_dot_product_attention(
            queries,
            key[:, :, earliest:last],
            value[:, :, earliest:last],
            attn_mask=mask.to(queries.device),
            scale=self.scale,
            enable_gqa=queries.shape[1] != key.shape[1],
        )
