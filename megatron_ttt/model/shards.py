"""Which part of a whole tensor a tensor-parallel rank holds: the one owner of that fact."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Ranges of a whole tensor along one dim; what a rank holds is them one after another.

    Attributes:
        axis: the dim that is split; ``None``: every rank holds the whole tensor.
        ranges: ``[start, end)`` in the whole tensor, in the order in which the rank holds them.
    """

    axis: int | None
    ranges: tuple[tuple[int, int], ...]

    def of(self, whole: Tensor) -> Tensor:
        """Return the rank's part of a whole tensor."""
        if self.axis is None:
            return whole
        parts = [whole.narrow(self.axis, start, end - start) for start, end in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


def sharded_dim(parameter: torch.nn.Parameter) -> int | None:
    """Return the dim along which tensor parallelism splits a parameter, or ``None``."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return getattr(parameter, "partition_dim") if sharded else None  # noqa: B009


def shard_of(name: str, parameter: torch.nn.Parameter, *, tp_rank: int, tp_size: int) -> Shard:
    """Return the part that a rank holds of a parameter.

    Gate and up are one tensor, and every rank holds its rows of gate, then of up. All others are
    cut into equal parts, the vocabulary with the rows that pad it.

    Args:
        name: of the parameter.
        parameter: the rank's, as Megatron made it.
        tp_rank, tp_size: the rank among the tensor-parallel ones.
    """
    axis = sharded_dim(parameter)
    if axis is None:
        return Shard(None, ())
    held = parameter.shape[axis]
    pieces = 2 if name.endswith("linear_fc1.weight") else 1
    width = held // pieces
    starts = [piece * width * tp_size + tp_rank * width for piece in range(pieces)]
    return Shard(axis, tuple((start, start + width) for start in starts))


def whole_shape(shard: Shard, parameter: torch.nn.Parameter, tp_size: int) -> tuple[int, ...]:
    """Return the shape of the whole tensor of which ``parameter`` is a shard."""
    shape = list(parameter.shape)
    if shard.axis is not None:
        shape[shard.axis] *= tp_size
    return tuple(shape)
