"""Floating-point operations of training, attention counted as it is: causal and by document.

A product of ``[m, k]`` and ``[k, n]`` counts ``2 m k n``. Recomputation and the second summary
sweep that context parallelism needs are not counted: they are cost, not work of the model.
"""

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.schema import Config
from megatron_ttt.rule import KERNEL_SIZE


def training_flops(config: Config, *, tokens: float, pairs: float) -> float:
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
    extra += 3 * (2 * hidden * hidden * ttt.proj + 2 * KERNEL_SIZE * hidden * ttt.conv)
    per_token += len(ttt_layers(config)) * extra
    return per_token * tokens + 3.0 * model.layers * 4 * queries * pairs


def training_flops_per_token(config: Config) -> float:
    """Mean over a row of ``train.seq_length`` tokens without document boundaries."""
    length = config.train.seq_length
    window = min(config.model.sliding_window or length, length)
    pairs = window * (window + 1) / 2 + (length - window) * window
    return training_flops(config, tokens=length, pairs=pairs) / length
