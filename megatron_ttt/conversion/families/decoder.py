"""What every family has in common, and the record by which they differ."""

from dataclasses import dataclass
from enum import Enum

from megatron_ttt.conversion.rules import AlwaysZero, Copy, InterleavedQKV, Rule, StackedGate

# Names behind "decoder.layers.N." and "model.layers.N.". Megatron's checkpoints name the two norms
# as if they were fused into the linear layer behind them.
LAYER: tuple[Rule, ...] = (
    Copy("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
    InterleavedQKV(
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        columns="H",
    ),
    Copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "HQ"),
    Copy("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"),
    StackedGate("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    Copy("mlp.linear_fc2.weight", "mlp.down_proj.weight", "HF"),
)
QUERY_KEY_NORMS: tuple[Rule, ...] = (
    Copy("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "E"),
    Copy("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "E"),
)
ATTENTION_BIAS: tuple[Rule, ...] = (
    InterleavedQKV(
        "self_attention.linear_qkv.bias",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        columns="",
    ),
)
# Megatron has a bias on the output projection only together with biases in the MLP.
OUTPUT_BIAS = AlwaysZero("self_attn.o_proj.bias", "H")

# Outside the layers. With tied embeddings neither side stores OUTPUT.
EMBEDDING = Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", "WH")
FINAL_NORM = Copy("decoder.final_layernorm.weight", "model.norm.weight", "H")
OUTPUT = Copy("output_layer.weight", "lm_head.weight", "WH")


class Bias(Enum):
    """Whether a family's queries, keys and values have biases."""

    NEVER = "never"
    ALWAYS = "always"
    CONFIGURED = "configured"  # by attention_bias, which adds one to the output projection too


class Window(Enum):
    """How a family's ``config.json`` says that attention slides."""

    OURS = "ours"  # sliding_window, which the family's own classes lack and ours have
    PLAIN = "plain"  # sliding_window alone
    SWITCHED = "switched"  # sliding_window with use_sliding_window and max_window_layers


@dataclass(frozen=True)
class FamilyTable:
    """One family.

    Attributes:
        model_type, architecture: as in ``config.json``.
        query_key_norms: RMSNorm on queries and keys.
        bias, window: see the enums.
        kv_groups, head_dim: what ``transformers`` takes where a ``config.json`` leaves out
            ``num_key_value_heads`` and ``head_dim``; ``None``: it follows from the other sizes.
    """

    model_type: str
    architecture: str
    query_key_norms: bool
    bias: Bias
    window: Window
    kv_groups: int | None = None
    head_dim: int | None = None
