"""Configurations of models with fast weights, for ``transformers``: a class for each family.

The keys ``ttt_mode, ttt_layers, ttt_proj, ttt_lr, ttt_chunk, ttt_target`` are those of the
published reference implementation, so that checkpoints exchange in both directions; what they
cannot say goes into ``ttt_conv, ttt_kernel_size, ttt_decay, ttt_clip_mode, ttt_clip_bound,
ttt_normalize, ttt_write, ttt_write_bound``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import transformers

from megatron_ttt.hf.versions import check_transformers

check_transformers(transformers.__version__)  # before a name is missing

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

from megatron_ttt.rule import (  # noqa: E402
    HF_TARGETS,
    KERNEL_SIZE,
    ClipMode,
    Conv,
    Normalize,
    UpdateRule,
    WriteKind,
    conv_of,
    kernel_complaint,
    rule_from_keys,
)

PUBLISHED_LAYERS = range(0, 31, 6)


def fast_layers(config: Any) -> list[int]:
    """Return the indices, from 0, of the layers with fast weights; sorted."""
    return list(config.ttt_layers)


def update_rule(config: Any) -> UpdateRule:
    """Return the update rule that a configuration describes."""
    return rule_from_keys(partial(getattr, config))


def _check(config: Any) -> None:
    """Fill ``ttt_layers`` and refuse values that mean nothing.

    Raises:
        ValueError: naming the key, its value, and what would be valid.
    """
    layers = config.num_hidden_layers
    if config.ttt_layers is None:
        config.ttt_layers = [layer for layer in PUBLISHED_LAYERS if layer < layers]
    missing = sorted({layer for layer in config.ttt_layers if not 0 <= layer < layers})
    if missing:
        warnings.warn(
            f"ttt_layers {missing} are dropped: the model has layers 0 to {layers - 1}",
            stacklevel=2,
        )
    config.ttt_layers = sorted({layer for layer in config.ttt_layers if 0 <= layer < layers})
    faults = []
    config.ttt_conv = conv_of(config.ttt_conv)
    complaint = kernel_complaint(config.ttt_conv, config.ttt_kernel_size)
    if complaint is not None:
        faults.append(f"ttt_kernel_size={config.ttt_kernel_size}: {complaint}")
    if config.ttt_chunk < 1:
        faults.append(f"ttt_chunk={config.ttt_chunk}: at least 1")
    if not 0.0 < config.ttt_decay <= 1.0:
        faults.append(f"ttt_decay={config.ttt_decay}: in (0, 1]")
    if config.ttt_clip_mode != "off" and not config.ttt_clip_bound > 0:
        faults.append(f"ttt_clip_bound={config.ttt_clip_bound}: above 0")
    if not config.ttt_write_bound > 0:
        faults.append(f"ttt_write_bound={config.ttt_write_bound}: above 0")
    for key, valid in (
        ("ttt_target", tuple(HF_TARGETS.values())),
        ("ttt_clip_mode", tuple(mode.value for mode in ClipMode)),
        ("ttt_conv", tuple(mode.value for mode in Conv)),
        ("ttt_normalize", tuple(mode.value for mode in Normalize)),
        ("ttt_write", tuple(kind.value for kind in WriteKind)),
    ):
        if getattr(config, key) not in valid:
            faults.append(f"{key}={getattr(config, key)!r}: one of {', '.join(valid)}")
    if getattr(config, "mlp_bias", False):
        faults.append("mlp_bias=True: a fast-weight layer has no bias")
    if faults:
        raise ValueError("; ".join(faults))


@dataclass(init=False)  # the families make one of all their keys
class TTTKeys:
    """The ``ttt_*`` keys; the others are those of the family's own configuration.

    ``ttt_mode`` False computes the model without fast weights. ``ttt_layers`` None: the published
    ones, 0, 6, ..., 30.
    """

    ttt_mode: bool = True
    ttt_layers: list[int] | None = None
    ttt_proj: bool = True
    ttt_lr: float | int = 0.3
    ttt_chunk: int = 8192
    ttt_target: str = "hidden_states"
    ttt_conv: str | bool = "learned"  # True and False: learned and off
    ttt_kernel_size: int = KERNEL_SIZE
    ttt_decay: float | int = 1.0
    ttt_clip_mode: str = "off"
    ttt_clip_bound: float | int = 0.1
    ttt_normalize: str = "none"
    ttt_write: str = "plain"
    ttt_write_bound: float | int = 0.3

    # The fast weight's shards would need sums that no plan describes.
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc] # of the family's configuration
        _check(self)


class Qwen3TTTConfig(TTTKeys, Qwen3Config):
    """Qwen3 with fast weights."""

    model_type = "qwen3_ttt"


class LlamaTTTConfig(TTTKeys, LlamaConfig):
    """LLaMA with fast weights, and with the window that LLaMA's own classes lack.

    ``sliding_window``: tokens that a query sees, itself included; ``None``: all before it.
    """

    model_type = "llama_ttt"

    sliding_window: int | None = None


class Qwen2TTTConfig(TTTKeys, Qwen2Config):
    """Qwen2 and Qwen2.5 with fast weights."""

    model_type = "qwen2_ttt"


class MistralTTTConfig(TTTKeys, MistralConfig):
    """Mistral with fast weights."""

    model_type = "mistral_ttt"
