"""A stand-in for Transformer Engine's modules: their names, parameters and extra state, in torch.

Not Transformer Engine: it has none of its kernels. It has what checkpoints see of it: the norm
fused into the linear layer behind it (``layer_norm_weight``) and an ``_extra_state`` in every
module, an empty byte tensor as Transformer Engine 2.20 returns it without fp8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ttt.model import layer_specs
from megatron_ttt.model.attention import TorchAttention
from megatron_ttt.model.norm import RMSNorm


class EmptyExtraState:
    """``_extra_state`` of a module without fp8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel():
            raise ValueError("extra state that holds something")


class Norm(EmptyExtraState, RMSNorm):
    """``TENorm``."""


class Attention(EmptyExtraState, TorchAttention):
    """``TEDotProductAttention``."""


class RowLinear(EmptyExtraState, RowParallelLinear):
    """``TERowParallelLinear``."""


class NormColumnLinear(EmptyExtraState, ColumnParallelLinear):
    """``TELayerNormColumnParallelLinear``: normalises, then multiplies."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = RMSNorm(config, input_size, eps=config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight
        self.epsilon = config.layernorm_epsilon

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = torch.nn.functional.rms_norm(
            inputs, inputs.shape[-1:], self.layer_norm_weight, self.epsilon
        )
        return super().forward(normed, *args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {"weight": 0, "bias": 0}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


def plain_spec(*, qk_layernorm: bool) -> ModuleSpec:
    """What ``get_gpt_layer_with_transformer_engine_spec`` is made of."""
    spec = layer_specs.torch_layer_spec(qk_norm=qk_layernorm)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    attention = parts.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = NormColumnLinear, RowLinear
    attention.core_attention = Attention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    parts.mlp.submodules.linear_fc1 = NormColumnLinear
    parts.mlp.submodules.linear_fc2 = RowLinear
    parts.sharded_state_dict_keys_map = {}
    return spec


@contextmanager
def transformer_engine_stand_in() -> Iterator[None]:
    """``model.attention=transformer_engine`` builds the stand-in's modules inside."""
    with (
        mock.patch.object(layer_specs, "get_gpt_layer_with_transformer_engine_spec", plain_spec),
        mock.patch.object(transformer_engine, "TENorm", Norm),
    ):
        yield
