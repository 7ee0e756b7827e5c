"""``transformers`` classes for exported models; importing this registers them.

    import megatron_ttt.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("exported")          # no trust_remote_code

Needs neither Megatron nor Hydra.
"""

import transformers

from megatron_ttt.hf.versions import check_transformers

check_transformers(transformers.__version__)

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from megatron_ttt.hf import configuration, modeling  # noqa: E402
from megatron_ttt.hf.auto_map import CLASSES  # noqa: E402
from megatron_ttt.hf.cache import FastWeightCache  # noqa: E402
from megatron_ttt.hf.configuration import (  # noqa: E402
    LlamaTTTConfig,
    MistralTTTConfig,
    Qwen2TTTConfig,
    Qwen3TTTConfig,
)
from megatron_ttt.hf.modeling import (  # noqa: E402
    LlamaTTTForCausalLM,
    LlamaTTTModel,
    MistralTTTForCausalLM,
    MistralTTTModel,
    Qwen2TTTForCausalLM,
    Qwen2TTTModel,
    Qwen3TTTForCausalLM,
    Qwen3TTTModel,
)

for _kind, _name in CLASSES.items():
    _config = getattr(configuration, f"{_name}Config")
    _causal = getattr(modeling, f"{_name}ForCausalLM")
    AutoConfig.register(_kind, _config, exist_ok=True)
    AutoModel.register(_config, getattr(modeling, f"{_name}Model"), exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)

__all__ = [
    "FastWeightCache",
    "LlamaTTTConfig",
    "LlamaTTTForCausalLM",
    "LlamaTTTModel",
    "MistralTTTConfig",
    "MistralTTTForCausalLM",
    "MistralTTTModel",
    "Qwen2TTTConfig",
    "Qwen2TTTForCausalLM",
    "Qwen2TTTModel",
    "Qwen3TTTConfig",
    "Qwen3TTTForCausalLM",
    "Qwen3TTTModel",
]
