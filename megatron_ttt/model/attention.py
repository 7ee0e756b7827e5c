"""Scaled-dot-product attention on any device: causal, windowed, by document, across CP ranks.

The ``torch`` backend's core attention. Keys and values are gathered over the context-parallel
group (grouped queries keep them small); queries stay where they are. What they see is planned once
for a micro-batch (``attention_plan.py``).

Shape letters: B batch rows, L tokens of this rank, A heads, G key/value groups, E head dim.
"""

import importlib
import importlib.util
import inspect
import math
import warnings
from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ttt.fast_weights.labels import Label, labelled
from megatron_ttt.model.attention_plan import AttentionPlan
from megatron_ttt.model.block_attention import block_attention
from megatron_ttt.model.masked_attention import masked_attention
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.model.varlen_attention import PackedSpan, VarlenKernel, varlen_attention
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
        if config.bf16 and not config.use_cpu_initialization and varlen_kernel() is None:
            warnings.warn(
                f"torch {torch.__version__} has no variable-length attention with windows and"
                " groups: documents and windows are masked, which is slower and takes more memory",
                stacklevel=2,
            )
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
        assert layout.attention is not None
        key, value = gather_sequences(key, value, group=self.cp_group, order=layout.order)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        with labelled(Label.ATTENTION):
            attended = attend(
                query,
                key,
                value,
                plan=layout.attention,
                packed=layout.packed,
                window=self.window,
                scale=self.scale,
            )
        return attended.permute(2, 0, 1, 3).flatten(2)


class Kernel(Enum):
    """What computes attention."""

    BLOCKS = "blocks"  # torch's flash kernel for CPUs, tile by tile
    VARLEN = "varlen"  # torch's variable-length kernel, over packed documents
    MASKED = "masked"  # any kernel that takes a mask


def kernel_for(tensor: Tensor) -> Kernel:
    """Return what attends on a tensor's device in its dtype.

    The variable-length kernel knows GPUs and 16 bits alone. Meta tensors stand for those on a GPU.
    """
    if tensor.is_cpu:
        return Kernel.BLOCKS
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    fits = is_half and (tensor.is_cuda or tensor.is_meta) and varlen_kernel() is not None
    return Kernel.VARLEN if fits else Kernel.MASKED


@cache
def varlen_kernel() -> VarlenKernel | None:
    """Return torch's kernel for packed documents; ``None`` where it knows no windows or groups."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    kernel: VarlenKernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    needed = {"scale", "window_size", "enable_gqa"}
    return kernel if needed <= inspect.signature(kernel).parameters.keys() else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    plan: AttentionPlan,
    packed: Sequence[PackedSpan],
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend: ``[B, A, L, E]``.

    Args:
        query: ``[B, A, L, E]``.
        key, value: ``[B, G, T, E]``, whole rows.
        plan, packed: what the queries see.
        window: keys that a query sees, its own included; ``None``: all before it.
        scale: of the products.
    """
    kernel = kernel_for(query)
    if kernel is Kernel.BLOCKS:
        return block_attention(query, key, value, plan=plan, window=window, scale=scale)
    if kernel is Kernel.MASKED or plan.is_causal(query.shape[2], window):
        return masked_attention(query, key, value, plan=plan, window=window, scale=scale)
    varlen = varlen_kernel()
    assert varlen is not None
    return varlen_attention(
        query, key, value, packed=packed, window=window, scale=scale, kernel=varlen
    )
