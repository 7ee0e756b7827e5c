"""Qwen3 (dense): norms on queries and keys; an optional window."""

from megatron_ttt.conversion.families.decoder import Bias, FamilyTable, Window

TABLE = FamilyTable(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    query_key_norms=True,
    bias=Bias.CONFIGURED,
    window=Window.SWITCHED,
    kv_groups=32,
    head_dim=128,
)
