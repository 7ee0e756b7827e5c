"""Floating-point operations of a training step, attention counted as it is: causal and by document.

A product of ``[m, k]`` and ``[k, n]`` counts ``2 m k n``. Recomputation and the second summary
sweep that context parallelism needs are not counted: they are cost, not work of the model.
"""

import torch
from torch import Tensor

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.schema import Config


def visible_pairs(
    document_starts: Tensor | None, *, shape: tuple[int, int], window: int | None
) -> int:
    """(query, key) pairs that causal attention visits in one layer over the given rows.

    Args:
        document_starts: ``[B, T]`` bool where attention stays within documents, else ``None``.
        shape: (B, T).
        window: keys a query sees at most, itself included.
    """
    batch, length = shape
    places = torch.arange(length).expand(batch, length)
    if document_starts is not None:
        starts = torch.where(document_starts, places, 0).cummax(dim=1).values
        places = places - starts
    seen = places + 1
    return int(seen.clamp(max=window).sum() if window is not None else seen.sum())


def training_flops(config: Config, *, tokens: int, pairs: int) -> float:
    """Forward and backward of ``tokens`` tokens with ``pairs`` visited pairs per layer.

    Backward costs twice the forward, but for the fast weight: its down projection takes 2 products
    forward and 5 backward where a dense one takes 1 and 2; the target adds its projection and the
    depthwise convolution.
    """
    model, ttt = config.model, config.ttt
    hidden, queries = model.hidden_size, model.heads * model.head_dim
    keys = model.kv_groups * model.head_dim
    attention = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden
    mlp = 3 * 2 * hidden * model.ffn_hidden_size
    output = 2 * hidden * model.vocab_size
    per_token = 3.0 * (model.layers * (attention + mlp) + output)
    extra = 4 * 2 * hidden * model.ffn_hidden_size
    extra += 3 * (2 * hidden * hidden * ttt.proj + 2 * 5 * hidden * ttt.conv)
    per_token += len(ttt_layers(config)) * extra
    return per_token * tokens + 3.0 * model.layers * 4 * queries * pairs
