"""The simplest layout of rows there is: whole, one document each, on one rank."""

import torch

from megatron_ttt.fast_weights.documents import plan_chunks
from megatron_ttt.model.attention_plan import plan_attention
from megatron_ttt.model.sequence_layout import SequenceLayout


def plain_rows(*, batch: int, length: int, chunk_size: int | None, decay: float) -> SequenceLayout:
    """Layout of rows to compare models on.

    Args:
        batch, length: of the rows.
        chunk_size, decay: of the fast weights; ``None``: without them.
    """
    plan = None
    if chunk_size is not None:
        plan = plan_chunks(
            None, batch=batch, length=length, chunk_size=chunk_size, decay=decay, device="cpu"
        )
    return SequenceLayout(
        qkv_format="sbhd",
        max_seqlen_q=length,
        max_seqlen_kv=length,
        length=length,
        ranges=((0, length),),
        attention=plan_attention(None, batch=batch, ranges=((0, length),)),
        positions=torch.arange(length)[None],
        plan=plan,
    )
