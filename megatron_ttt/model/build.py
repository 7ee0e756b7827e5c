"""From a configuration to this rank's pipeline stage, ready to train."""

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ttt.config.derived import padded_vocab_size, resolve_attention, ttt_layers
from megatron_ttt.config.schema import ClipMode, Config
from megatron_ttt.fast_weights.scale import Clip, Normalize
from megatron_ttt.fast_weights.scale import ClipMode as ClipKind
from megatron_ttt.model.fast_weight_mlp import FastWeightSettings
from megatron_ttt.model.gpt import InPlaceTTTModel
from megatron_ttt.model.initialize import initialize, pretraining_draw
from megatron_ttt.model.layer_specs import decoder_block_spec


def fast_weight_settings(config: Config) -> FastWeightSettings | None:
    """What a fast-weight layer needs of the configuration; ``None`` with ``ttt=off``."""
    ttt = config.ttt
    if not ttt_layers(config):
        return None
    clip = None
    if ttt.clip.mode is not ClipMode.off:
        clip = Clip(mode=ClipKind(ttt.clip.mode.value), bound=ttt.clip.bound)
    return FastWeightSettings(
        learning_rate=ttt.eta,
        normalize=Normalize(ttt.normalize.value),
        target=ttt.target,
        conv=ttt.conv,
        proj=ttt.proj,
        clip=clip,
    )


def build_model(
    config: Config, transformer: TransformerConfig, groups: ProcessGroupCollection
) -> InPlaceTTTModel:
    """Build and initialise this rank's stage.

    Args:
        config: the run.
        transformer: Megatron's view of it (``config/to_megatron.py``).
        groups: process groups; nothing is read from ``parallel_state``.
    """
    settings = fast_weight_settings(config)
    backend = resolve_attention(config, cuda=torch.cuda.is_available(), transformer_engine=HAVE_TE)
    spec = decoder_block_spec(
        transformer,
        backend=backend.value,
        fast_layers=frozenset(ttt_layers(config)),
        settings=settings,
        groups=groups,
    )
    model = InPlaceTTTModel(
        transformer,
        spec,
        model=config.model,
        target=settings.target if settings is not None else None,
        padded_vocab_size=padded_vocab_size(config.model, groups.tp.size()),
        max_sequence_length=config.train.seq_length,
        groups=groups,
    )
    initialize(
        model,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        draw=pretraining_draw(config.model),
    )
    return model
