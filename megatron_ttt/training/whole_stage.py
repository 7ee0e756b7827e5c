"""Waits for weights that are still being gathered, for whoever reads them outside a forward."""

from collections.abc import Iterable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch.nn import Parameter


def whole_stage(model: DistributedDataParallel) -> Any:
    """Return the pipeline stage inside DDP with all its weights up to date.

    With ``parallel.overlap_param_gather`` an optimizer step leaves each data-parallel rank with
    its own shard of the new weights and the others' of the old ones; the rest follows in the next
    forward, module by module. Every data-parallel rank asks at the same point: it communicates.
    """
    if model.use_forward_hook:
        model.start_param_sync(force_sync=True)
    return model.module


def wait_for(model: DistributedDataParallel, weights: Iterable[Parameter]) -> None:
    """Wait for some weights alone, so that the gathers of the others can still be hidden."""
    if model.use_forward_hook:
        for weight in weights:
            group = model.param_to_bucket_group[weight]
            group.finish_param_sync(skip_next_bucket_dispatch=True)
