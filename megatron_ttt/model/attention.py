"""Scaled-dot-product attention on any device: causal, windowed, by document, across CP ranks.

The ``torch`` backend's core attention. Keys and values are gathered over the context-parallel
group (grouped queries keep them small); queries stay where they are, see ``windowed_attention.py``.

Shape letters: B batch rows, L tokens of this rank, A heads, G key/value groups, E head dim.
"""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.model.windowed_attention import causal_attention
from megatron_ttt.parallel.collectives import gather_sequences


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
            outputs.append(
                causal_attention(
                    query[:, :, offset : offset + end - start],
                    key,
                    value,
                    first=[start],
                    window=self.window,
                    documents=layout.documents,
                    scale=self.scale,
                )
            )
            offset += end - start
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return attended.permute(2, 0, 1, 3).flatten(2)
