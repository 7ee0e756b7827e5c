"""``config.json`` <-> :class:`ModelConfig`, both ways, as ``transformers`` from 5.20 on reads it.

What our schema cannot express is refused by name, never dropped: a checkpoint that "matches" with
other rotary frequencies or a forgotten bias is the classic silent fault of conversions. A key that
is absent means what it means to the family's class in ``transformers``.
"""

import ctypes
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.schema import Family, ModelConfig, RopeConfig, RopeScaling
from megatron_ttt.conversion.config_values import Values, shown
from megatron_ttt.conversion.families import FAMILIES
from megatron_ttt.conversion.families.decoder import Bias, FamilyTable, Window
from megatron_ttt.conversion.hf_rope import rope_fields, rope_from_hf, scaling_keys

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
# Values of the other keys that our model computes; any other value is refused. The lower ones mean
# nothing to these families' own classes in ``transformers`` but something to other programs that
# read the file, so no two of them would compute the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None,),
    "kv_sharing_modes": (None,),
    "attention_chunk_size": (None,),
    "fusion_config": (None,),
    "transformers_weights": (None,),
    "text_config": (None,),
    "text_encoder": (None,),
    "decoder": (None,),
    "generator": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "attention_multiplier": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
}
_KINDS = ("full_attention", "sliding_attention")
DTYPES = ("float64", "float32", "float16", "bfloat16")
MOST_LAYERS = 10_000
MOST_HEADS = 2**16


def model_from_hf(config: dict[str, Any], *, name: str, where: str) -> ModelConfig:
    """Return the architecture that a ``config.json`` describes.

    Args:
        config: its content.
        name: for ``ModelConfig.name``.
        where: named in errors.

    Raises:
        ConfigError: an unknown family, missing keys, values of a wrong type, or values our model
            has no place for: one fault for each.
    """
    values = Values(config, where)
    family = _family(values)
    table = FAMILIES[family]
    _refuse_others(values, table)
    heads = values.integer("num_attention_heads", most=MOST_HEADS)
    hidden = values.integer("hidden_size")
    layers = values.integer("num_hidden_layers", most=MOST_LAYERS)
    positions = values.integer("max_position_embeddings")
    biased = table.bias is Bias.ALWAYS
    if table.bias is Bias.CONFIGURED:
        biased = values.boolean("attention_bias", False)
    model = ModelConfig(
        name=name,
        family=family,
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=values.integer("intermediate_size"),
        heads=heads,
        kv_groups=values.integer(
            "num_key_value_heads", table.kv_groups or heads, null=heads, most=MOST_HEADS
        ),
        head_dim=_head_dim(values, table, hidden, heads),
        vocab_size=values.integer("vocab_size"),
        max_positions=positions,
        norm_epsilon=values.number("rms_norm_eps", 1e-6),
        qk_norm=table.query_key_norms,
        attention_bias=biased,
        tied_embeddings=values.boolean("tie_word_embeddings", False),
        sliding_window=_window(values, table, layers),
        initializer_range=values.number("initializer_range", 0.02),
        rope=rope_from_hf(values, max_positions=positions),
    )
    if model.heads % model.kv_groups:
        values.fault("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if model.head_dim % 2:
        key = "head_dim" if "head_dim" in config else "hidden_size"
        values.fault(key, "heads must have an even number of dimensions")
    values.check()
    return model


def hf_from_model(model: ModelConfig) -> dict[str, Any]:
    """Return the architecture's part of a ``config.json``.

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
        "rope_scaling": scaling_keys(model.rope),
    }
    if table.bias is Bias.CONFIGURED:
        config["attention_bias"] = model.attention_bias
    if table.window is not Window.OURS or model.sliding_window is not None:
        config["sliding_window"] = model.sliding_window
    if table.window is Window.SWITCHED:
        config["use_sliding_window"] = model.sliding_window is not None
        config["max_window_layers"] = 0 if model.sliding_window is not None else model.layers
    return config


def without_fast_weights(config: dict[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` under the plain architecture that computes the same.

    LLaMA with a window is Mistral: the classes differ in nothing else.

    Args:
        config: as :func:`hf_from_model` makes it, or of a model with fast weights.

    Raises:
        ConfigError: LLaMA with a window and biases, which no plain architecture has.
    """
    model_type = config["model_type"].removesuffix(TTT_SUFFIX)
    table = next(table for table in FAMILIES.values() if table.model_type == model_type)
    config = {key: value for key, value in config.items() if key != "auto_map"}
    if table.window is Window.OURS and config.get("sliding_window") is not None:
        if config.get("attention_bias"):
            message = "no plain architecture has a window and biases (model.attention_bias=true)"
            raise ConfigError([Fault("model.sliding_window", config["sliding_window"], message)])
        table = FAMILIES[Family.mistral]
        config.pop("attention_bias", None)
    config |= {"model_type": table.model_type, "architectures": [table.architecture]}
    return config


def check_agreement(
    model: ModelConfig, checkpoint: ModelConfig, where: str, *, chosen: Collection[str] = ()
) -> list[str]:
    """Return a model's configuration must be that of the checkpoint it starts from.

    Two differences are meant: YaRN over a checkpoint without it, stretching exactly the positions
    that the checkpoint has; and more positions than it has, which is a choice that gets a notice.

    Args:
        model: the run's.
        checkpoint: read from the checkpoint.
        where: the checkpoint, for the message.
        chosen: dotted keys by which the run may differ, since the user gave them.

    Returns:
        One line for each difference that is a choice.

    Raises:
        ConfigError: one fault for each other differing key, under both sides' names.
    """
    ours, theirs = _flat(model), _flat(checkpoint)
    ignored = {"name", "attention"}
    if _stretches(model, checkpoint):
        ignored |= {name for name in ours if name.startswith("rope.") and name != "rope.base"}
        ignored.add("max_positions")
    faults, notices = [], []
    if "max_positions" not in ignored and model.max_positions > checkpoint.max_positions:
        ignored.add("max_positions")
        notices.append(
            f"notice: model.max_positions={model.max_positions}, the checkpoint has"
            f" {_NAMES['max_positions']}={checkpoint.max_positions} ({where}): the rotary"
            " embedding goes on beyond them as it is"
        )
    for name, value in ours.items():
        if name in ignored or _same(value, theirs[name]):
            continue
        read = theirs[name].name if hasattr(theirs[name], "name") else theirs[name]
        message = f"the checkpoint has {_NAMES[name]}={read} ({where})"
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
            used = {"base", "scaling", *rope_fields(model.rope.scaling)}
            for inner in fields(value):
                plain = getattr(RopeConfig(), inner.name)
                kept = getattr(value, inner.name) if inner.name in used else plain
                flat[f"{field.name}.{inner.name}"] = kept
        else:
            flat[field.name] = value
    return flat


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        # what is equal in fp32 computes the same: some files carry 1e-5 as fp32 has it
        return ours is not None and theirs is not None and _fp32(ours) == _fp32(theirs)
    return bool(ours == theirs)


def _fp32(value: float) -> float:
    return ctypes.c_float(value).value  # an infinity beyond fp32, where struct would raise


def _family(values: Values) -> Family:
    """Return the model family.

    Raises:
        ConfigError: at once, since every other key depends on it.
    """
    given = values.content.get("model_type")
    model_type = given.removesuffix(TTT_SUFFIX) if isinstance(given, str) else None
    for family, table in FAMILIES.items():
        if table.model_type == model_type:
            return family
    known = ", ".join(table.model_type for table in FAMILIES.values())
    message = f"unknown model_type; known: {known}"
    raise ConfigError([Fault(f"{values.where}: model_type", shown(given), message)])


def _refuse_others(values: Values, table: FamilyTable) -> None:
    """Note what would make ``transformers``, or another reader, compute something else."""
    content = values.content
    for key, allowed in _FIXED.items():
        value = content.get(key, allowed[0])
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            values.fault(key, f"must be {shown(allowed[0])}: nothing else is computed here")
    for key in ("dtype", "torch_dtype"):  # tensors keep their own, but it must be one
        if content.get(key) is not None:
            values.text(key, "", DTYPES)
    ours = str(content["model_type"]).endswith(TTT_SUFFIX)
    if ours or any(key.startswith("ttt_") for key in content):
        return  # the reference implementation brings classes of its own, and so do we
    names = values.entries("architectures", str)
    right = (table.architecture, table.architecture.replace("ForCausalLM", "TTTForCausalLM"))
    if names and not set(names) & set(right):
        message = f"model_type={table.model_type} is {right[0]}: one of the two is wrong"
        values.fault("architectures", message)
    if content.get("auto_map") is not None:
        message = "the model's own code decides what it computes: remove the key if it is plain"
        values.fault("auto_map", f"{message} {right[0]}")


def _head_dim(values: Values, table: FamilyTable, hidden: int, heads: int) -> int:
    """Of one head; a key of its own, or what the hidden size leaves for each."""
    whole = hidden // heads
    if values.content.get("head_dim") is None and table.head_dim is None:
        if hidden % heads:
            values.fault("hidden_size", f"must be a multiple of num_attention_heads={heads}")
        return max(1, whole)
    dim: int = values.integer("head_dim", table.head_dim)
    return dim


def _window(values: Values, table: FamilyTable, layers: int) -> int | None:
    """Return the window of all layers, or ``None``; a window in some of them is a fault."""
    kinds = values.entries("layer_types", str)
    if kinds is not None and (len(kinds) != layers or not set(kinds) <= set(_KINDS)):
        values.fault("layer_types", f"must be {layers} times full_attention or sliding_attention")
        return None
    window: int | None = None
    if table.window is Window.OURS and str(values.content["model_type"]).endswith(TTT_SUFFIX):
        window = values.integer("sliding_window", None, null=None)
    elif table.window is Window.OURS:
        if values.content.get("sliding_window") is not None:
            values.fault("sliding_window", f"{table.architecture} has none: must be null")
    elif table.window is Window.PLAIN:
        window = values.integer("sliding_window", 4096, null=None)
    elif values.boolean("use_sliding_window", False):
        window = values.integer("sliding_window", 4096, null=None)
        first = _first_window(values)
        if kinds is None:
            kinds = [_KINDS[window is not None and layer >= first] for layer in range(layers)]
        if len(set(kinds)) > 1:
            message = "a window in some layers only is not supported"
            values.fault(
                "layer_types" if "layer_types" in values.content else "max_window_layers", message
            )
            return None
        if kinds[0] == "full_attention":
            return None
    if kinds is not None and set(kinds) != {_KINDS[window is not None]}:
        values.fault("layer_types", f"does not fit sliding_window={shown(window)}")
    return window


def _first_window(values: Values) -> int:
    """``max_window_layers``, which may be 0: the first layer with a window."""
    first = values.content.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool):
        values.fault("max_window_layers", "must be a whole number")
        return 0
    return first
