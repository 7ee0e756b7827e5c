"""``config.json`` <-> :class:`ModelConfig`, both ways, for every ``transformers`` since 4.56.

What our schema cannot express is refused by name, never dropped: a checkpoint that "matches" with
other rotary frequencies or a forgotten bias is the classic silent fault of conversions.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_ttt.config.derived import attention_factor
from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.schema import Family, ModelConfig, RopeConfig, RopeScaling
from megatron_ttt.conversion.families import FAMILIES
from megatron_ttt.conversion.families.decoder import Bias, Window

TTT_SUFFIX = "_ttt"  # of model_type, in models exported with fast weights
_NAMES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "qk_norm": "model_type",
    "attention_bias": "attention_bias",
    "tied_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
    "initializer_range": "initializer_range",
    "family": "model_type",
    "rope.base": "rope_theta",
    "rope.scaling": "rope_scaling.rope_type",
    "rope.factor": "rope_scaling.factor",
    "rope.original_max_positions": "rope_scaling.original_max_position_embeddings",
    "rope.low_freq_factor": "rope_scaling.low_freq_factor",
    "rope.high_freq_factor": "rope_scaling.high_freq_factor",
    "rope.beta_fast": "rope_scaling.beta_fast",
    "rope.beta_slow": "rope_scaling.beta_slow",
}
# Keys by which a run may differ from a published model by choice.
CHOICES = ("model.sliding_window",)
_REQUIRED = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Values of the other keys that our model computes; any other value is refused.
_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}


def model_from_hf(config: dict[str, Any], *, name: str, where: str) -> ModelConfig:
    """The architecture that a ``config.json`` describes.

    Args:
        config: its content.
        name: for ``ModelConfig.name``.
        where: named in errors.

    Raises:
        ConfigError: an unknown family, missing keys, or values our model has no place for.
    """
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ConfigError([Fault(where, ",".join(missing), "missing from its config.json")])
    family = _family(config, where)
    config = {**FAMILIES[family].defaults, **config}
    faults = list(_refusals(config, family, where))
    if faults:
        raise ConfigError(faults)
    table = FAMILIES[family]
    heads = config["num_attention_heads"]
    biased = table.bias is Bias.ALWAYS
    if table.bias is Bias.CONFIGURED:
        biased = bool(config.get("attention_bias", False))
    return ModelConfig(
        name=name,
        family=family,
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        heads=heads,
        kv_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        qk_norm=table.query_key_norms,
        attention_bias=biased,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_window(config, family),
        initializer_range=config.get("initializer_range", 0.02),
        rope=_rope(config, where),
    )


def hf_from_model(model: ModelConfig) -> dict[str, Any]:
    """The architecture's part of a ``config.json``.

    Rotary keys are written in the older form, ``rope_theta`` and ``rope_scaling``, which
    ``transformers`` 4 and 5 both read.

    Raises:
        ConfigError: no Hugging Face architecture of this family has such a model.
    """
    table = FAMILIES[model.family]
    faults = []
    if model.qk_norm != table.query_key_norms:
        faults.append(Fault("model.qk_norm", model.qk_norm, f"{table.architecture} differs"))
    if table.bias is not Bias.CONFIGURED and model.attention_bias != (table.bias is Bias.ALWAYS):
        message = f"{table.architecture} differs"
        faults.append(Fault("model.attention_bias", model.attention_bias, message))
    if model.sliding_window is not None and table.window is Window.NEVER:
        message = f"{table.architecture} has no window; model.family=mistral has"
        faults.append(Fault("model.sliding_window", model.sliding_window, message))
    if faults:
        raise ConfigError(faults)
    config: dict[str, Any] = {
        "model_type": table.model_type,
        "architectures": [table.architecture],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.initializer_range,
        "hidden_act": "silu",
        "rope_theta": model.rope.base,
        "rope_scaling": _rope_scaling(model.rope),
    }
    if table.bias is Bias.CONFIGURED:
        config["attention_bias"] = model.attention_bias
    if table.window is not Window.NEVER:
        config["sliding_window"] = model.sliding_window
    if table.window is Window.SWITCHED:
        config["use_sliding_window"] = model.sliding_window is not None
        config["max_window_layers"] = 0 if model.sliding_window is not None else model.layers
    return config


def check_agreement(
    model: ModelConfig, checkpoint: ModelConfig, where: str, *, chosen: Collection[str] = ()
) -> list[str]:
    """A model's configuration must be that of the checkpoint it starts from.

    One difference is meant: YaRN over a checkpoint without it, stretching exactly the positions
    that the checkpoint has.

    Args:
        model: the run's.
        checkpoint: read from the checkpoint.
        where: the checkpoint, for the message.
        chosen: dotted keys by which the run may differ, since the user gave them.

    Returns:
        One line for each difference that the user chose.

    Raises:
        ConfigError: one fault for each other differing key, under both sides' names.
    """
    ours, theirs = _flat(model), _flat(checkpoint)
    ignored = {"name", "attention"}
    if _stretches(model, checkpoint):
        ignored |= {name for name in ours if name.startswith("rope.") and name != "rope.base"}
        ignored.add("max_positions")
    faults, notices = [], []
    for name, value in ours.items():
        if name in ignored or _same(value, theirs[name]):
            continue
        shown = theirs[name].name if hasattr(theirs[name], "name") else theirs[name]
        message = f"the checkpoint has {_NAMES[name]}={shown} ({where})"
        if f"model.{name}" in chosen:
            notices.append(f"notice: model.{name}={show(value)}, {message}")
            continue
        faults.append(Fault(f"model.{name}", value, message))
    if faults:
        raise ConfigError(faults)
    return notices


def _stretches(model: ModelConfig, checkpoint: ModelConfig) -> bool:
    return (
        model.rope.scaling is RopeScaling.yarn
        and checkpoint.rope.scaling is RopeScaling.none
        and model.rope.original_max_positions == checkpoint.max_positions
    )


def _flat(model: ModelConfig) -> dict[str, Any]:
    """Field by field; those of the rotary embedding that have no effect are left at defaults."""
    flat: dict[str, Any] = {}
    for field in fields(model):
        value = getattr(model, field.name)
        if is_dataclass(value):
            used = {"base", "scaling", *_rope_fields(model.rope.scaling)}
            for inner in fields(value):
                plain = getattr(RopeConfig(), inner.name)
                kept = getattr(value, inner.name) if inner.name in used else plain
                flat[f"{field.name}.{inner.name}"] = kept
        else:
            flat[field.name] = value
    return flat


def _rope_fields(scaling: RopeScaling) -> tuple[str, ...]:
    if scaling is RopeScaling.llama3:
        return ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor")
    if scaling is RopeScaling.yarn:
        return ("factor", "original_max_positions", "beta_fast", "beta_slow")
    return ()


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        return ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


def _family(config: dict[str, Any], where: str) -> Family:
    model_type = str(config["model_type"]).removesuffix(TTT_SUFFIX)
    for family, table in FAMILIES.items():
        if table.model_type == model_type:
            return family
    known = ", ".join(table.model_type for table in FAMILIES.values())
    raise ConfigError([Fault(where, config["model_type"], f"unknown model_type; known: {known}")])


def _refusals(config: dict[str, Any], family: Family, where: str) -> Iterator[Fault]:
    for key, value in _FIXED.items():
        if config.get(key, value) not in (value, None):
            yield Fault(f"{where}: {key}", config[key], f"must be {value}")
    if config.get("quantization_config") is not None:
        yield Fault(f"{where}: quantization_config", "set", "quantized weights do not convert")
    window = FAMILIES[family].window is Window.SWITCHED and config.get("use_sliding_window")
    if window and config["sliding_window"] is not None and len(_kinds(config)) > 1:
        yield Fault(
            f"{where}: max_window_layers",
            config["max_window_layers"],
            "a window in some layers only is not supported; it must be 0",
        )


def _kinds(config: dict[str, Any]) -> set[str]:
    """Kinds of attention among the layers of a family that can switch its window on."""
    given = config.get("layer_types")
    if given:
        return set(given)
    first, layers = config["max_window_layers"], config["num_hidden_layers"]
    return {"sliding_attention" if layer >= first else "full_attention" for layer in range(layers)}


def _window(config: dict[str, Any], family: Family) -> int | None:
    kind = FAMILIES[family].window
    if kind is Window.NEVER:
        return None
    if kind is Window.SWITCHED and not (
        config.get("use_sliding_window") and "sliding_attention" in _kinds(config)
    ):
        return None
    window: int | None = config.get("sliding_window")
    return window


def _rope(config: dict[str, Any], where: str) -> RopeConfig:
    """Both spellings: ``rope_parameters`` (5) and ``rope_theta`` with ``rope_scaling`` (4)."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = given.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError([Fault(f"{where}: partial_rotary_factor", "below 1", "must be 1.0")])
    if kind == "default":
        return RopeConfig(base=float(base))
    if kind not in (RopeScaling.llama3.value, RopeScaling.yarn.value):
        message = "unknown rotary scaling; known: default, llama3, yarn"
        raise ConfigError([Fault(f"{where}: rope_type", kind, message)])
    rope = RopeConfig(base=float(base), scaling=RopeScaling(kind))
    original = given.pop("original_max_position_embeddings", None)
    rope.original_max_positions = original or config["max_position_embeddings"]
    for field in _rope_fields(rope.scaling):
        if field != "original_max_positions" and given.get(field) is not None:
            setattr(rope, field, float(given.pop(field)))
    usual: dict[str, Any] = {"truncate": True}
    if kind == "yarn":
        usual["attention_factor"] = attention_factor(rope)
    unknown = {
        key: value
        for key, value in given.items()
        if value is not None and not (key in usual and _same(value, usual[key]))
    }
    if unknown:
        faults = [Fault(f"{where}: {key}", unknown[key], "not supported") for key in unknown]
        raise ConfigError(faults)
    return rope


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling is RopeScaling.none:
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling.value}
    for field in _rope_fields(rope.scaling):
        name = "original_max_position_embeddings" if field == "original_max_positions" else field
        scaling[name] = getattr(rope, field)
    return scaling
