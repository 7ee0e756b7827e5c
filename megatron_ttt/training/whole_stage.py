"""Waits for weights that are still being gathered, for whoever reads them outside a forward."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel


def whole_stage(model: DistributedDataParallel) -> Any:
    """Return the pipeline stage inside DDP with all its weights up to date.

    With ``parallel.overlap_param_gather`` an optimizer step leaves each data-parallel rank with
    its own shard of the new weights and the others' of the old ones; the rest follows in the next
    forward, module by module. Every data-parallel rank asks at the same point: it communicates.
    """
    if model.use_forward_hook:
        model.start_param_sync(force_sync=True)
    return model.module
