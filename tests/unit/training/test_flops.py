"""Operations counted against a count written out token by token."""

from dataclasses import replace

import torch

from megatron_ttt.config.flops import training_flops
from megatron_ttt.config.schema import Trainable, TTTMode
from megatron_ttt.training.step import visible_pairs
from tests.distributed.training_runs import tiny_config


def test_visible_pairs_by_document_and_window() -> None:
    starts = torch.zeros(2, 10, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, 4] = starts[0, 5] = True
    lengths = [4, 1, 5, 10]

    def pairs(length: int, window: int) -> int:
        return sum(min(place + 1, window) for place in range(length))

    for window in (1, 3, 100):
        expected = sum(pairs(length, window) for length in lengths)
        assert visible_pairs(starts, rows=2, length=10, window=window) == expected
    whole = visible_pairs(None, rows=2, length=10, window=None)
    assert whole == 2 * 55
    assert visible_pairs(starts, rows=2, length=10, window=None) < whole


def test_training_flops_are_three_forwards_and_the_fast_weights_extra() -> None:
    config = tiny_config()
    off = replace(config, ttt=replace(config.ttt, mode=TTTMode.off))
    tokens, pairs = 1000, 30000
    model = config.model
    queries = model.heads * model.head_dim
    layer = model.hidden_size * (2 * queries + 2 * model.kv_groups * model.head_dim)
    layer += 3 * model.hidden_size * model.ffn_hidden_size
    forward = 2 * tokens * (model.layers * layer + model.hidden_size * model.vocab_size)
    forward += model.layers * 2 * 2 * queries * pairs
    assert training_flops(off, tokens=tokens, pairs=pairs) == 3 * forward
    # Two fast layers: 7 products of the down projection instead of 3, projection, convolution.
    product = 2 * tokens * model.hidden_size * model.ffn_hidden_size
    target = 3 * 2 * tokens * (model.hidden_size**2 + 5 * model.hidden_size)
    extra = training_flops(config, tokens=tokens, pairs=pairs) - 3 * forward
    assert extra == 2 * (4 * product + target)


def test_frozen_layers_cost_no_gradient_of_their_weights() -> None:
    """Layers 1 and 3 of four are fast: 0 has no backward, 2 passes a gradient on."""
    config = tiny_config()
    config.ttt.layers = [1, 3]
    tokens, pairs = 1000, 30000

    def flops(trainable: Trainable) -> float:
        train = replace(config.train, trainable=trainable)
        return training_flops(replace(config, train=train), tokens=tokens, pairs=pairs)

    model = config.model
    queries = model.heads * model.head_dim
    layer = model.hidden_size * (2 * queries + 2 * model.kv_groups * model.head_dim)
    layer = 2 * tokens * (layer + 3 * model.hidden_size * model.ffn_hidden_size)
    output, attention = 2 * tokens * model.hidden_size * model.vocab_size, 4 * queries * pairs
    whole, layers, generator = (flops(part) for part in Trainable)
    assert whole - layers == (1 + 2) * layer + output + 2 * attention
    assert layers - generator == 2 * layer
