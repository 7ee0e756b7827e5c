"""A checkpoint's model on every rank of the job."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import ComputeConfig
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.conversion.loading import load_hf_weights
from megatron_ttt.conversion.opened import Checkpoint
from megatron_ttt.model.build import build_model
from megatron_ttt.model.gpt import InPlaceTTTModel
from megatron_ttt.model.initialize import Origin
from megatron_ttt.training.checkpoint import UnfitCheckpoint, load_model
from megatron_ttt.training.distributed import Ranks, distributed


@contextmanager
def loaded(
    checkpoint: Checkpoint, config: ComputeConfig
) -> Iterator[tuple[InPlaceTTTModel, Ranks]]:
    """Load the weights into Megatron's model, in ``eval`` mode; every rank of the job calls it.

    Args:
        checkpoint: of either format.
        config: how it is read; see ``config/reading.reading_config``.

    Raises:
        ConfigError: the folder cannot be loaded.
    """
    # Advice about overlapping the reduction of gradients; reading has none.
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    with distributed(config) as ranks:
        transformer = transformer_config(config, device_is_cuda=ranks.device.type == "cuda")
        model = build_model(config, transformer, ranks.groups, Origin.LOADED)
        model = model.to(ranks.device).eval()
        if checkpoint.is_megatron:
            try:
                load_model(checkpoint.path, model, ranks=ranks)
            except UnfitCheckpoint as error:
                raise ConfigError([Fault("checkpoint", checkpoint.path, str(error))]) from error
        else:
            tp = ranks.groups.tp
            load_hf_weights(checkpoint.path, model, config, tp_rank=tp.rank(), tp_size=tp.size())
        yield model, ranks
