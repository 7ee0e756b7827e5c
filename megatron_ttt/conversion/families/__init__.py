"""The families that convert, one table file each."""

from megatron_ttt.config.schema import Family
from megatron_ttt.conversion.families import llama, mistral, qwen2, qwen3
from megatron_ttt.conversion.families.decoder import FamilyTable

FAMILIES: dict[Family, FamilyTable] = {
    Family.qwen3: qwen3.TABLE,
    Family.llama: llama.TABLE,
    Family.qwen2: qwen2.TABLE,
    Family.mistral: mistral.TABLE,
}
