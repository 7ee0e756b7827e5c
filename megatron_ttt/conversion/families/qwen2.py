"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from megatron_ttt.conversion.families.decoder import Bias, FamilyTable, Window

TABLE = FamilyTable(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    query_key_norms=False,
    bias=Bias.ALWAYS,
    window=Window.SWITCHED,
    kv_groups=32,
)
