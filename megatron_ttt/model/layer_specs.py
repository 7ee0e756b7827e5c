"""Megatron-core layer specs with fast-weight layers among plain ones, for both backends."""

from dataclasses import replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_ttt.config.schema import AttentionBackend
from megatron_ttt.model.attention import TorchAttention
from megatron_ttt.model.bare_weight import BareDownProjection
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.norm import RMSNorm
from megatron_ttt.rule import UpdateRule

# Checkpoints name the norms as if they were fused into the linear layer behind them, as
# Transformer Engine's spec does, so that both backends read each other's checkpoints.
FUSED_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class FastWeightTransformerLayer(TransformerLayer):
    """A Megatron layer that hands the micro-batch's layout to its MLP as well."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; ``padding_mask`` is the one argument its MLP receives on every path."""
        return super().forward(*args, **{**kwargs, "padding_mask": kwargs["packed_seq_params"]})


def torch_layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """Return a plain layer of Megatron's own modules with torch attention; runs on any device."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=TorchAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm if qk_norm else IdentityOp,
                    k_layernorm=RMSNorm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=FUSED_NORM_NAMES,
        ),
    )


def plain_layer_spec(backend: AttentionBackend, *, qk_norm: bool) -> ModuleSpec:
    """Return the layer without fast weights for a resolved backend (not ``auto``)."""
    if backend is AttentionBackend.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    return torch_layer_spec(qk_norm=qk_norm)


def fast_weight_layer_spec(
    plain: ModuleSpec,
    backend: AttentionBackend,
    rule: UpdateRule,
    groups: ProcessGroupCollection,
) -> ModuleSpec:
    """Return the same layer with its MLP replaced.

    Transformer Engine's spec fuses the norm before the MLP into the first linear layer; the target
    generator needs the normalised input itself, so here the norm stands alone on both backends.
    """
    norm: Any = RMSNorm
    if backend is AttentionBackend.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    mlp = ModuleSpec(
        module=FastWeightMLP,
        params={"rule": rule, "groups": groups},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=BareDownProjection),
    )
    names = {
        **plain.submodules.sharded_state_dict_keys_map,
        "pre_mlp_layernorm.": FUSED_NORM_NAMES["pre_mlp_layernorm."],
    }
    submodules = replace(
        plain.submodules, pre_mlp_layernorm=norm, mlp=mlp, sharded_state_dict_keys_map=names
    )
    return ModuleSpec(module=FastWeightTransformerLayer, submodules=submodules)


def decoder_block_spec(
    config: TransformerConfig,
    *,
    backend: AttentionBackend,
    fast_layers: frozenset[int],
    rule: UpdateRule | None,
    groups: ProcessGroupCollection,
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage and the final norm.

    Args:
        config: Megatron's configuration of the whole model.
        backend: resolved attention backend.
        fast_layers: global indices, from 0, of the layers with fast weights.
        rule: of those layers; ``None`` without any.
        groups: process groups; ``pp`` decides which layers are ours.
    """
    plain = plain_layer_spec(backend, qk_norm=config.qk_layernorm)
    norm: Any = RMSNorm
    if backend is AttentionBackend.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    stage = groups.pp.rank()
    first = get_transformer_layer_offset(config, None, stage)
    count = get_num_layers_to_build(config, None, stage)
    fast = None
    if rule is not None:
        fast = fast_weight_layer_spec(plain, backend, rule, groups)
    layers = [
        fast if fast is not None and index in fast_layers else plain
        for index in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
