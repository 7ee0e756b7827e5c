"""LLaMA 3.x: the plain decoder."""

from megatron_ttt.conversion.families.decoder import Bias, FamilyTable, Window

TABLE = FamilyTable(
    model_type="llama",
    architecture="LlamaForCausalLM",
    query_key_norms=False,
    bias=Bias.CONFIGURED,
    window=Window.OURS,
)
