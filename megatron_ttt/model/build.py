"""From a configuration to this rank's pipeline stage, ready to train."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ttt.config.derived import padded_vocab_size, ttt_layers
from megatron_ttt.config.schema import AttentionBackend, ComputeConfig
from megatron_ttt.model.gpt import InPlaceTTTModel
from megatron_ttt.model.initialize import Origin, initialize, pretraining_draw
from megatron_ttt.model.layer_specs import decoder_block_spec


def build_model(
    config: ComputeConfig,
    transformer: TransformerConfig,
    groups: ProcessGroupCollection,
    start: Origin = Origin.DRAWN,
) -> InPlaceTTTModel:
    """Build and initialise this rank's stage.

    Args:
        config: what is computed, and on which ranks.
        transformer: Megatron's view of it (``config/to_megatron.py``).
        groups: process groups; nothing is read from ``parallel_state``.
        start: whether values are drawn, or something is loaded into the model next.
    """
    rule = config.ttt if ttt_layers(config) else None
    fused = transformer.transformer_impl == "transformer_engine"
    backend = AttentionBackend.transformer_engine if fused else AttentionBackend.torch
    spec = decoder_block_spec(
        transformer,
        backend=backend,
        fast_layers=frozenset(ttt_layers(config)),
        rule=rule,
        groups=groups,
    )
    model = InPlaceTTTModel(
        transformer,
        spec,
        model=config.model,
        target=rule.target if rule is not None else None,
        padded_vocab_size=padded_vocab_size(config.model, groups.tp.size()),
        max_sequence_length=config.train.seq_length,
        loss_tokens=config.train.loss_tokens,
        groups=groups,
    )
    if start is Origin.LOADED:
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        return model
    initialize(
        model,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        draw=pretraining_draw(config.model),
        replicas=groups.dp_cp,
    )
    return model
