"""The start of a target generator that a checkpoint does not have: the same as in training.

``ttt_conv`` is zero, so the logits are the checkpoint's; ``ttt_proj`` is diagonal
N(0, initializer_range^2), drawn for each layer from (seed, name).
"""

import torch
from torch import Tensor

from megatron_ttt.config.schema import ModelConfig
from megatron_ttt.conversion.rules import TensorMap
from megatron_ttt.model.initialize import named_generator, pretraining_draw


def initial_target(
    tensor: TensorMap, model: ModelConfig, *, seed: int, dtype: torch.dtype
) -> Tensor:
    """Return a whole ``ttt_conv`` or ``ttt_proj``, rounded to the checkpoint's dtype."""
    draw = pretraining_draw(model)
    generator = named_generator(seed, tensor.megatron)
    return draw(tensor.megatron, tensor.shape, generator).to(dtype)
