"""One rank's tensor on every rank of a group."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def broadcast_from(tensor: Tensor, *, group: Any, owner: int) -> Tensor:
    """Return the tensor of rank ``owner`` (counted in ``group``), on all ranks; not differentiable.

    Args:
        tensor: of the same shape and dtype everywhere; only the owner's values are read. May be
            written to.
    """
    shared = tensor.contiguous()
    dist.broadcast(shared, dist.get_global_rank(group, owner), group=group)
    return shared
