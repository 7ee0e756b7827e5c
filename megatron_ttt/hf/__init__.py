"""``transformers`` classes for exported models; importing this registers them.

    import megatron_ttt.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("exported")          # no trust_remote_code

Needs neither Megatron nor Hydra.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_ttt.hf.cache import FastWeightCache
from megatron_ttt.hf.configuration import LlamaTTTConfig, Qwen3TTTConfig
from megatron_ttt.hf.modeling import (
    LlamaTTTForCausalLM,
    LlamaTTTModel,
    Qwen3TTTForCausalLM,
    Qwen3TTTModel,
)

for _config, _model, _causal in (
    (Qwen3TTTConfig, Qwen3TTTModel, Qwen3TTTForCausalLM),
    (LlamaTTTConfig, LlamaTTTModel, LlamaTTTForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)

__all__ = [
    "FastWeightCache",
    "LlamaTTTConfig",
    "LlamaTTTForCausalLM",
    "LlamaTTTModel",
    "Qwen3TTTConfig",
    "Qwen3TTTForCausalLM",
    "Qwen3TTTModel",
]
