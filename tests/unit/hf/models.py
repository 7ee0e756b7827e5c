"""Tiny models with live fast weights, and an independent transcription of what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ttt.conversion.reference_rule import ReferenceMLP
from megatron_ttt.hf import (
    FastWeightCache,
    LlamaTTTConfig,
    LlamaTTTForCausalLM,
    MistralTTTConfig,
    MistralTTTForCausalLM,
    Qwen2TTTConfig,
    Qwen2TTTForCausalLM,
    Qwen3TTTConfig,
    Qwen3TTTForCausalLM,
)

CHUNK = 8
VOCABULARY = 103
FAMILIES = {
    "qwen3": (Qwen3TTTConfig, Qwen3TTTForCausalLM),
    "llama": (LlamaTTTConfig, LlamaTTTForCausalLM),
    "qwen2": (Qwen2TTTConfig, Qwen2TTTForCausalLM),
    "mistral": (MistralTTTConfig, MistralTTTForCausalLM),
}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "ttt_layers": [0, 2],
    "ttt_chunk": CHUNK,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Largest update ratio at the end of 3 chunks; tests see 0.05 to 0.3.
WANTED_RATIO = 0.2


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """``[B, T]`` random tokens; 0 is left to padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def live_model(
    family: str = "qwen3", *, dtype: torch.dtype = torch.float64, seed: int = 1, **keys: Any
) -> Any:
    """A model whose fast weights are alive: asymmetric random conv, dense random projection.

    ``ttt_lr`` is set so that the largest update ratio after three chunks is ``WANTED_RATIO``.
    """
    torch.manual_seed(seed)
    configuration, model_class = FAMILIES[family]
    model = model_class(configuration(**{**SHAPE, **keys})).eval()
    for layer in model.config.ttt_layers:
        mlp = model.model.layers[layer].mlp
        if "ttt_conv.weight" in mlp.added:
            torch.nn.init.normal_(mlp.ttt_conv.weight, std=0.5)
        if "ttt_proj.weight" in mlp.added:
            torch.nn.init.normal_(mlp.ttt_proj.weight, std=0.3)
        if "ttt_gate.weight" in mlp.added:
            torch.nn.init.normal_(mlp.ttt_gate.weight, std=0.5)
            torch.nn.init.constant_(mlp.ttt_gate_bias.weight, -0.4)
    model.to(dtype)
    model.config.ttt_lr = 1e-4
    model.config.ttt_lr *= WANTED_RATIO / float(max(ratios(model)))
    assert all(0.05 < ratio < 0.3 for ratio in ratios(model)), ratios(model)
    return model


@torch.no_grad()
def ratios(model: Any) -> list[float]:
    """The update ratio of every fast-weight layer after three chunks, the largest over rows."""
    cache = FastWeightCache(model.config)
    model(tokens(2, 3 * model.config.ttt_chunk, seed=5), past_key_values=cache)
    layers = model.model.layers
    return [
        float(state.update_ratios(layers[layer].mlp.down_proj.weight).max())
        for layer, state in cache.fast_weights.items()
    ]


def transcribed_logits(model: Any, row: Tensor) -> Tensor:
    """Logits of one unpadded row ``[T]``, written down anew from the method's equations.

    Only attention and norms are the model's own modules; each fast-weight layer is the package's
    ``ReferenceMLP``, which shares nothing with the classes under test. Differentiable.
    """
    config, body = model.config, model.model
    length = len(row)
    embeddings = body.embed_tokens(row[None])
    angles = body.rotary_emb(embeddings, torch.arange(length)[None])
    mask = torch.full((length, length), float("-inf"), dtype=embeddings.dtype).triu(1)[None, None]
    hidden = embeddings
    for index, layer in enumerate(body.layers):
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=angles,
            attention_mask=mask,
        )
        hidden = hidden + attended
        inputs = layer.post_attention_layernorm(hidden)
        if index not in config.ttt_layers:
            hidden = hidden + layer.mlp(inputs)
            continue
        source = embeddings if config.ttt_target == "input_embed" else inputs
        mlp = ReferenceMLP(
            layer.mlp,
            kernel_D15=layer.mlp.ttt_conv.weight,
            projection_DD=layer.mlp.ttt_proj.weight,
            eta=config.ttt_lr,
            chunk_size=config.ttt_chunk,
            source_BTD=source,
        )
        hidden = hidden + mlp(inputs)
    return model.lm_head(body.norm(hidden))[0]


@torch.no_grad()
def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest absolute logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())
