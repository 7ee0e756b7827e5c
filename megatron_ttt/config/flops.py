"""Floating-point operations of training, attention counted as it is: causal and by document.

A product of ``[m, k]`` and ``[k, n]`` counts ``2 m k n``. Recomputation and the second summary
sweep that context parallelism needs are not counted: they are cost, not work of the model.
"""

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.schema import Config, Trainable


def training_flops(config: Config, *, tokens: float, pairs: float) -> float:
    """Forward and backward of ``tokens`` tokens with ``pairs`` visited pairs per layer.

    Backward costs twice the forward, but for the fast weight: its down projection takes 2 products
    forward and 5 backward where a dense one takes 1 and 2; the target adds its projection and the
    depthwise convolution. A frozen layer (``train.trainable``) has no gradient of its weights, and
    below the lowest trained layer no backward at all.
    """
    model, ttt = config.model, config.ttt
    hidden, queries = model.hidden_size, model.heads * model.head_dim
    keys = model.kv_groups * model.head_dim
    attention = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden
    mlp = 3 * 2 * hidden * model.ffn_hidden_size
    output = 2 * hidden * model.vocab_size
    fast = ttt_layers(config)
    lowest = 0 if config.train.trainable is Trainable.all else min(fast)
    reached = model.layers - lowest  # layers that a gradient passes
    trained = {
        Trainable.all: model.layers,
        Trainable.fast_layers: len(fast),
        Trainable.target_generator: 0,
    }[config.train.trainable]
    per_token = (model.layers + reached + trained) * float(attention + mlp)
    per_token += (3.0 if config.train.trainable is Trainable.all else 2.0) * output
    taps = ttt.kernel_size if ttt.conv.is_learned else 0
    extra = 4 * 2 * hidden * model.ffn_hidden_size
    extra += 3 * (2 * hidden * hidden * ttt.proj + 2 * taps * hidden)
    per_token += len(fast) * extra
    return per_token * tokens + (model.layers + 2.0 * reached) * 4 * queries * pairs


def training_flops_per_token(config: Config) -> float:
    """Mean over a row of ``train.seq_length`` tokens without document boundaries."""
    length = config.train.seq_length
    window = min(config.model.sliding_window or length, length)
    pairs = window * (window + 1) / 2 + (length - window) * window
    return training_flops(config, tokens=length, pairs=pairs) / length
