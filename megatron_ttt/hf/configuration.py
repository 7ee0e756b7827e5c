"""Configurations of Qwen3 and LLaMA models with fast weights, for ``transformers``.

The keys ``ttt_mode, ttt_layers, ttt_proj, ttt_lr, ttt_chunk, ttt_target`` are those of the
published reference implementation, so that checkpoints exchange in both directions; what they
cannot say goes into ``ttt_conv, ttt_decay, ttt_clip_mode, ttt_clip_bound, ttt_normalize``.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import LlamaConfig, Qwen3Config

from megatron_ttt.fast_weights.scale import Clip, ClipMode, Normalize
from megatron_ttt.inference.fast_weight_state import UpdateRule

TARGETS = ("hidden_states", "input_embed")
CLIP_MODES = ("off", *(mode.value for mode in ClipMode))
LAYER_INTERVAL = 6


def fast_layers(config: Any) -> list[int]:
    """Indices, from 0, of the layers with fast weights; sorted."""
    return list(config.ttt_layers)


def update_rule(config: Any) -> UpdateRule:
    """The update rule that a configuration describes."""
    clip = None
    if config.ttt_clip_mode != "off":
        clip = Clip(bound=config.ttt_clip_bound, mode=ClipMode(config.ttt_clip_mode))
    return UpdateRule(
        chunk_size=config.ttt_chunk,
        learning_rate=config.ttt_lr,
        decay=config.ttt_decay,
        clip=clip,
        normalize=Normalize(config.ttt_normalize),
    )


def _check(config: Any) -> None:
    """Fill ``ttt_layers`` and refuse values that mean nothing.

    Raises:
        ValueError: naming the key, its value, and what would be valid.
    """
    layers = config.num_hidden_layers
    if config.ttt_layers is None:
        config.ttt_layers = list(range(0, layers, LAYER_INTERVAL))
    missing = sorted({layer for layer in config.ttt_layers if not 0 <= layer < layers})
    if missing:
        warnings.warn(
            f"ttt_layers {missing} are dropped: the model has layers 0 to {layers - 1}",
            stacklevel=2,
        )
    config.ttt_layers = sorted({layer for layer in config.ttt_layers if 0 <= layer < layers})
    faults = []
    if config.ttt_chunk < 1:
        faults.append(f"ttt_chunk={config.ttt_chunk}: at least 1")
    if not 0.0 < config.ttt_decay <= 1.0:
        faults.append(f"ttt_decay={config.ttt_decay}: in (0, 1]")
    if config.ttt_clip_mode != "off" and not config.ttt_clip_bound > 0:
        faults.append(f"ttt_clip_bound={config.ttt_clip_bound}: above 0")
    for key, valid in (
        ("ttt_target", TARGETS),
        ("ttt_clip_mode", CLIP_MODES),
        ("ttt_normalize", tuple(mode.value for mode in Normalize)),
    ):
        if getattr(config, key) not in valid:
            faults.append(f"{key}={getattr(config, key)!r}: one of {', '.join(valid)}")
    if getattr(config, "mlp_bias", False):
        faults.append("mlp_bias=True: a fast-weight layer has no bias")
    if faults:
        raise ValueError("; ".join(faults))


class Qwen3TTTConfig(Qwen3Config):
    """Qwen3 with fast weights. See the module's lines; other keys are ``Qwen3Config``'s.

    ``ttt_layers`` None: every sixth. ``ttt_mode`` False computes the model without fast weights.
    """

    model_type = "qwen3_ttt"
    base_model_tp_plan = None  # the fast weight's shards would need sums that no plan describes

    ttt_mode: bool = True
    ttt_layers: list[int] | None = None
    ttt_proj: bool = True
    ttt_lr: float | int = 0.3
    ttt_chunk: int = 8192
    ttt_target: str = "hidden_states"
    ttt_conv: bool = True
    ttt_decay: float | int = 1.0
    ttt_clip_mode: str = "off"
    ttt_clip_bound: float | int = 0.1
    ttt_normalize: str = "none"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)


class LlamaTTTConfig(LlamaConfig):
    """LLaMA with fast weights; keys as in :class:`Qwen3TTTConfig`."""

    model_type = "llama_ttt"
    base_model_tp_plan = None

    ttt_mode: bool = True
    ttt_layers: list[int] | None = None
    ttt_proj: bool = True
    ttt_lr: float | int = 0.3
    ttt_chunk: int = 8192
    ttt_target: str = "hidden_states"
    ttt_conv: bool = True
    ttt_decay: float | int = 1.0
    ttt_clip_mode: str = "off"
    ttt_clip_bound: float | int = 0.1
    ttt_normalize: str = "none"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)
