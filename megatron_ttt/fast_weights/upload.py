"""From the host's memory to a device, without waiting."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a CPU tensor on ``device``; the host goes on while it travels.

    Only a copy out of page-locked memory is asynchronous, and operations such as ``torch.cat``
    put their result into ordinary memory: so it is locked here, unless it is already.
    """
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
