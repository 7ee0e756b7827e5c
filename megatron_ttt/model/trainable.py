"""Which parameters a run changes. The others get no gradient, no buffer and no optimizer state."""

from collections.abc import Collection

import torch

from megatron_ttt.config.schema import Trainable
from megatron_ttt.model.initialize import global_parameters
from megatron_ttt.rule import added_start


def freeze(model: torch.nn.Module, trainable: Trainable, fast_layers: Collection[int]) -> None:
    """Let gradients reach only what is trained; before anything is built on the parameters.

    Layers below the lowest trained one then run without a backward: nothing in them asks for one.

    Args:
        model: a pipeline stage.
        trainable: what a run changes.
        fast_layers: layers with fast weights, from 0.
    """
    for name, parameter in global_parameters(model):
        parameter.requires_grad_(is_trained(name, trainable, fast_layers))


def is_trained(name: str, trainable: Trainable, fast_layers: Collection[int]) -> bool:
    """Whether a run changes a parameter, by its name in the whole model."""
    if trainable is Trainable.all:
        return True
    if trainable is Trainable.target_generator:
        return added_start(name) is not None
    parts = name.split(".")
    return parts[:2] == ["decoder", "layers"] and int(parts[2]) in fast_layers
