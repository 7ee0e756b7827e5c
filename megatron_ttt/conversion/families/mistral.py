"""Mistral: LLaMA with an optional window."""

from megatron_ttt.conversion.families.decoder import Bias, FamilyTable, Window

TABLE = FamilyTable(
    model_type="mistral",
    architecture="MistralForCausalLM",
    query_key_norms=False,
    bias=Bias.NEVER,
    window=Window.PLAIN,
    kv_groups=8,
)
