"""The ``ttt_*`` keys of a ``config.json`` <-> :class:`TTTConfig`.

``ttt_mode, ttt_layers, ttt_proj, ttt_lr, ttt_chunk, ttt_target`` are the names of the published
reference implementation, with its values where one is absent; what they cannot say goes into
``ttt_conv, ttt_kernel_size, ttt_decay, ttt_clip_mode, ttt_clip_bound, ttt_normalize, ttt_write,
ttt_write_bound``.

A file with any of these keys, or with one of our model types, describes a model with fast weights
unless it says ``ttt_mode: false``; ``ttt_mode`` may be left out.
"""

import re
import warnings
from collections.abc import Collection
from dataclasses import replace
from enum import Enum
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import TTTConfig, TTTMode
from megatron_ttt.conversion.config_values import Values
from megatron_ttt.conversion.hf_config import TTT_SUFFIX
from megatron_ttt.conversion.mapping import TargetGenerator
from megatron_ttt.rule import (
    HF_TARGETS,
    KERNEL_SIZE,
    Clip,
    ClipMode,
    Conv,
    Normalize,
    WriteKind,
    WriteSettings,
    added_parameters,
    conv_of,
    default_layers,
    kernel_complaint,
    keys_of_rule,
    rule_from_keys,
)

REFERENCE_LEARNING_RATE = 0.3
REFERENCE_CHUNK = 8192
REFERENCE_LAYERS = range(0, 31, 6)  # as published, whatever the number of layers
_TENSOR = re.compile(r"model\.layers\.(\d+)\.mlp\.ttt_\w+\.weight")


def trained_layers(tensors: Collection[str]) -> tuple[int, ...]:
    """Layers to which fast weights add parameters, among tensors of these names."""
    found = (_TENSOR.fullmatch(name) for name in tensors)
    return tuple(sorted({int(match[1]) for match in found if match is not None}))


def has_rule(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` describes an update rule, in use or switched off."""
    ours = str(config.get("model_type")).endswith(TTT_SUFFIX)
    return ours or any(key.startswith("ttt_") for key in config)


def ttt_from_hf(
    config: dict[str, Any],
    *,
    layers: int,
    where: str,
    tensors: Collection[str] = (),
    chunk_size: int | None = None,
    eta: float | None = None,
) -> TTTConfig | None:
    """Return the fast weights that a checkpoint has; ``None`` for a plain model, or with them off.

    Layers that the model lacks are dropped with one warning (a published configuration names one).

    Args:
        config: content of ``config.json``.
        layers: of the model.
        where: named in errors.
        tensors: names of the checkpoint's; empty where they are not known. They decide about
            layers that the file does not name.
        chunk_size, eta: instead of the file's.

    Raises:
        ConfigError: a value that means nothing, layers that are not those of the tensors, or
            tensors of fast weights without anything that says how they are used.
    """
    trained = [layer for layer in trained_layers(tensors) if layer < layers]
    if not has_rule(config):
        if not trained:
            return None
        if chunk_size is None or eta is None:
            message = (
                f"there are fast weights in layers {trained}, but nothing says with which chunk"
                " and eta: give ttt.chunk_size and ttt.eta, to an import or to a run, or write"
                " ttt_chunk and ttt_lr into its config.json"
            )
            raise ConfigError([Fault(where, "no ttt_* keys", message)])
    values = Values(config, where)
    on = values.boolean("ttt_mode", True)
    rule = _rule(values)
    listed = values.entries("ttt_layers", int)
    values.check()
    if not on:
        return None
    kept = _layers(listed, trained, layers, where)
    named = {name.removesuffix(".weight").rpartition(".")[2] for name in tensors}
    if trained and "ttt_conv" not in config and "ttt_conv" not in named:
        rule = replace(rule, conv=Conv.off)
    if trained and "ttt_proj" not in config:
        rule = replace(rule, proj="ttt_proj" in named)
    return replace(
        rule,
        layers=kept,
        chunk_size=rule.chunk_size if chunk_size is None else chunk_size,
        eta=rule.eta if eta is None else eta,
    )


def _rule(values: Values) -> TTTConfig:
    """Everything but the layers."""
    decay = values.number("ttt_decay", 1.0)
    if decay > 1:
        values.fault("ttt_decay", "must be at most 1")
    size = values.integer("ttt_kernel_size", KERNEL_SIZE)
    conv = _conv(values)
    complaint = kernel_complaint(conv, size)
    if complaint is not None:
        values.fault("ttt_kernel_size", complaint)
    read = {
        "ttt_chunk": values.integer("ttt_chunk", REFERENCE_CHUNK),
        "ttt_lr": values.number("ttt_lr", REFERENCE_LEARNING_RATE, zero=True),
        "ttt_normalize": _word(values, "ttt_normalize", Normalize.none),
        "ttt_target": values.text("ttt_target", "hidden_states", tuple(HF_TARGETS.values())),
        "ttt_conv": conv,
        "ttt_kernel_size": size,
        "ttt_proj": values.boolean("ttt_proj", True),
        "ttt_decay": decay,
        "ttt_clip_mode": _word(values, "ttt_clip_mode", ClipMode.off),
        "ttt_clip_bound": values.number("ttt_clip_bound", Clip().bound),
        "ttt_write": _word(values, "ttt_write", WriteKind.plain),
        "ttt_write_bound": values.number("ttt_write_bound", WriteSettings().bound),
    }
    return TTTConfig(**vars(rule_from_keys(read.__getitem__)))


def _conv(values: Values) -> str:
    """Return the word for the convolution; files of before there were words say true or false."""
    given = values.content.get("ttt_conv")
    if isinstance(given, bool):
        return str(conv_of(given))
    return _word(values, "ttt_conv", Conv.learned)


def _word(values: Values, key: str, default: Enum) -> str:
    """Return the value of a key that holds a member of the default's enum."""
    return values.text(key, default.value, tuple(one.value for one in type(default)))


def _layers(listed: list[int] | None, trained: list[int], layers: int, where: str) -> list[int]:
    """Return the layers with fast weights, sorted."""
    if listed is None:
        return trained or [layer for layer in REFERENCE_LAYERS if layer < layers]
    absent = sorted({layer for layer in listed if not 0 <= layer < layers})
    if absent:
        warnings.warn(
            f"{where}: ttt_layers {absent} are dropped: layers are 0 to {layers - 1}", stacklevel=3
        )
    kept = sorted(set(listed) - set(absent))
    if trained and kept != trained:
        message = f"the files have fast weights in layers {trained}"
        raise ConfigError([Fault(f"{where}: ttt_layers", listed, message)])
    return kept


def hf_from_ttt(ttt: TTTConfig, *, layers: int) -> dict[str, Any]:
    """Return the ``ttt_*`` keys; none for a plain model.

    A convolution that is switched off is exported as an identity kernel, since the published keys
    cannot say that there is none.
    """
    target = target_generator(ttt, layers=layers)
    if not target.layers:
        return {}
    layout = {"ttt_mode": True, "ttt_layers": list(target.layers)}
    keys = keys_of_rule(ttt)
    if ttt.conv is Conv.off:
        keys |= {"ttt_conv": Conv.learned.value, "ttt_kernel_size": KERNEL_SIZE}
    return {**layout, **keys}


def target_generator(ttt: TTTConfig | None, *, layers: int) -> TargetGenerator:
    """Which target tensors a model of that many layers has."""
    if ttt is None or ttt.mode is TTTMode.off:
        return TargetGenerator(())
    chosen = default_layers(layers) if ttt.layers is None else sorted(ttt.layers)
    return TargetGenerator(tuple(chosen), added_parameters(ttt))
