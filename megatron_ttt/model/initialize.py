"""Initial values as a function of (seed, parameter name): one start, whatever the layout.

Megatron's own draws depend on the tensor rank and the pipeline stage. Here every tensor is drawn
whole from a generator seeded by its name and then sliced, so that any layout starts from the same
model.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.config.schema import ModelConfig
from megatron_ttt.model.shards import shard_of, whole_shape
from megatron_ttt.rule import Start, added_start

_FC1_PARTS = ("gate", "up")  # drawn apart, so that neither depends on the other's size


class Origin(Enum):
    """Where a model's values come from."""

    DRAWN = "drawn"  # from the seed
    LOADED = "loaded"  # from a checkpoint, next; 0 until then, also what that leaves out (padding)


Draw = Callable[[str, tuple[int, ...], torch.Generator], Tensor]


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a pipeline stage under their names in the whole model.

    Layers are numbered from 0 over the whole model. A tied output layer on a later stage goes by
    the embedding's name, of which it is a copy.
    """
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{numbers[int(local)]}.{rest}"
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def pretraining_draw(model: ModelConfig) -> Draw:
    """Return the start of training from scratch, and of a target generator that is added.

    Norms 1, biases 0, what the update rule adds as ``rule.py`` declares it (the model starts as the
    plain one), all else N(0, sigma^2), with projections back into the residual stream divided by
    ``sqrt(2 * layers)``; sigma is ``initializer_range``.
    """
    sigma = model.initializer_range

    def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        start = added_start(name)
        if name.endswith("bias") or start is Start.zeros:
            return torch.zeros(shape)
        if start is Start.diagonal:
            return torch.diag(torch.randn(shape[0], generator=generator) * sigma)
        scale = sigma
        if "linear_proj" in name or "linear_fc2" in name:
            scale = sigma / math.sqrt(2 * model.layers)
        return torch.randn(shape, generator=generator) * scale

    return draw


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    *,
    seed: int,
    vocab_size: int,
    tp_rank: int,
    tp_size: int,
    draw: Draw,
    replicas: Any = None,
) -> None:
    """Fill this rank's parameters with their slices of the whole drawn tensors.

    A tensor is one stream of a serial generator, so a slice cannot be drawn without what is before
    it. Ranks that hold the same slices draw a share of the tensors each, and send it to the others.

    Args:
        model: a pipeline stage of :class:`InPlaceTTTModel`.
        seed: of the run.
        vocab_size: real rows of the vocabulary; rows that pad it become 0.
        tp_rank, tp_size: this rank's slice.
        draw: gives a whole tensor for (name, shape, generator).
        replicas: process group of the ranks with the same slices; ``None``: draw everything here.
    """
    ranks = 1 if replicas is None else replicas.size()
    rank = 0 if replicas is None else replicas.rank()
    parameters = list(global_parameters(model))
    for name, parameter in parameters[rank::ranks]:
        shard = shard_of(name, parameter, tp_rank=tp_rank, tp_size=tp_size)
        shape = whole_shape(shard, parameter, tp_size)
        if name.endswith("linear_fc1.weight"):
            half = (shape[0] // 2, *shape[1:])
            value = torch.cat([_whole(f"{name}/{part}", half, seed, draw) for part in _FC1_PARTS])
        elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            value = parameter.new_zeros(shape, dtype=torch.float32, device="cpu")
            value[:vocab_size] = _whole(name, (vocab_size, *shape[1:]), seed, draw)
        else:
            value = _whole(name, shape, seed, draw)
        parameter.copy_(shard.of(value))
    if replicas is not None and ranks > 1:
        members = dist.get_process_group_ranks(replicas)
        for place, (_, parameter) in enumerate(parameters):
            dist.broadcast(parameter, src=members[place % ranks], group=replicas)


def _whole(name: str, shape: tuple[int, ...], seed: int, draw: Draw) -> Tensor:
    return draw(name, shape, named_generator(seed, name))
