"""Any ``config.json``: our reading computes what ``transformers`` computes, or it is refused.

Random files are read by both sides. What ours accepts is compared with the classes of
``transformers``, built from the same file: parameters, norms, windows, rotary frequencies. What it
refuses takes one line for each fault, whatever the values are.
"""

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_ttt.config.derived import attention_factor
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import ModelConfig
from megatron_ttt.conversion.hf_config import hf_from_model, model_from_hf
from megatron_ttt.conversion.mapping import TargetGenerator, build_mapping
from megatron_ttt.model.rope import inverse_frequencies

transformers = pytest.importorskip("transformers")

FAMILIES = ["qwen3", "qwen2", "llama", "mistral"]
LAYERS, LENGTH = 2, 12
PLAIN: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 11,
    "max_position_embeddings": 64,
}
PROBE = torch.tensor(0.7)
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
ROPES: list[Any] = [
    None,
    {},
    {"rope_type": "default"},
    {"rope_theta": 1e6},
    {"type": "yarn", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0},
    {"rope_type": None, "type": "yarn", "factor": 2.0},
    {"rope_type": "default", "type": "yarn", "factor": 2.0},
    YARN,
    {**YARN, "rope_theta": 5e5},
    {**YARN, "factor": None},
    {**YARN, "factor": 1},
    {**YARN, "truncate": None},
    {**YARN, "truncate": True, "mscale": None, "attention_factor": None},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0},
    {**YARN, "attention_factor": 1.5},
    {**YARN, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "beta_fast": 0, "beta_slow": None},
    {**YARN, "original_max_position_embeddings": 4},
    {"rope_type": "yarn"},
    LLAMA3,
    {key: value for key, value in LLAMA3.items() if key != "factor"},
    {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
    {**LLAMA3, "partial_rotary_factor": 0.5},
    {FULL: {"rope_type": "default", "rope_theta": 1e6}, SLIDING: YARN},
    "yarn",
    [YARN],
]
# Values that mean something; every key also takes each of ODD.
MEANT: dict[str, list[Any]] = {
    "num_hidden_layers": [1, 2],
    "hidden_size": [64, 60],
    "num_attention_heads": [4, 8],
    "num_key_value_heads": [1, 4, 8, 3],
    "head_dim": [6, 8, 16, 7],
    "rms_norm_eps": [1e-5, 1e-6],
    "rope_theta": [1e6, 10000, 5e5],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "partial_rotary_factor": [1.0, 0.5],
    "original_max_position_embeddings": [16, 32],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "hidden_act": ["silu", "gelu", "swish"],
    "sliding_window": [8, 9],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2, 28],
    "layer_types": [
        [FULL] * LAYERS,
        [SLIDING] * LAYERS,
        [FULL, SLIDING],
        [FULL],
        ["chunked_attention"] * LAYERS,
        [],
    ],
    "is_causal": [True, False],
    "attention_chunk_size": [8],
    "per_layer_config": [{"0": {"num_attention_heads": 4}}],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], []],
    "attention_dropout": [0.0, 0.1],
    "pretraining_tp": [1, 2],
    "quantization_config": [{"quant_method": "fp8"}],
    "dtype": ["float16"],
    "torch_dtype": ["bfloat16"],
    "text_config": [{"hidden_size": 5}],
    "logit_scale": [2.0],
}
ODD: list[Any] = [
    None,
    "4",
    "false",
    0,
    -1,
    1.5,
    True,
    [],
    {},
    [None],
    [[]],
    float("inf"),
    float("nan"),
    10**400,
]
MISSING = object()


def changes() -> st.SearchStrategy[dict[str, Any]]:
    """Some keys of a file, each with a value that means something, an odd one, or missing."""

    def entry(key: str) -> st.SearchStrategy[tuple[str, Any]]:
        values = st.sampled_from(MEANT[key])
        odd = st.sampled_from([*ODD, MISSING])
        return st.tuples(st.just(key), st.one_of(values, values, values, odd))

    entries = st.sampled_from(sorted(MEANT)).flatmap(entry)
    return st.lists(entries, min_size=1, max_size=4).map(dict)


@pytest.fixture(autouse=True)
def silent_transformers() -> Iterator[None]:
    """Its warnings about odd files are not what is tested."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def theirs(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the classes of ``transformers`` make of a file; ``None`` if they cannot read it."""
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    try:
        read = kind.from_dict(json.loads(json.dumps(config)))
        model = transformers.AutoModelForCausalLM.from_config(read, attn_implementation="eager")
    except (StrictDataclassError, AttributeError, TypeError):  # as for attention_dropout=null
        return None
    model.eval()
    body = model.model
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["attention_mask"][0, 0] == 0)

    for layer in body.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    cached = transformers.DynamicCache(config=read).layers
    tied = set(model.all_tied_weights_keys)
    return {
        "shapes": {
            name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied
        },
        "eps": {m.variance_epsilon for m in model.modules() if hasattr(m, "variance_epsilon")},
        "scale": {layer.self_attn.scaling for layer in body.layers},
        "act": {round(float(layer.mlp.act_fn(PROBE)), 6) for layer in body.layers},
        "masks": [mask.tolist() for mask in seen],
        "cached": [getattr(layer, "sliding_window", None) for layer in cached],
        "frequencies": [round(float(f), 12) for f in body.rotary_emb.inv_freq],
        "attention_factor": round(body.rotary_emb.attention_scaling, 9),
    }


def ours(model: ModelConfig) -> dict[str, Any]:
    """The same of our reading."""
    mapping = build_mapping(model, TargetGenerator(()))
    place = torch.arange(LENGTH)
    back = place[:, None] - place[None]
    mask = (back >= 0) & (back < (model.sliding_window or LENGTH))
    return {
        "shapes": {**mapping.hf_shapes(), **mapping.zeros},
        "eps": {model.norm_epsilon},
        "scale": {model.head_dim**-0.5},
        "act": {round(float(torch.nn.functional.silu(PROBE)), 6)},
        "masks": [mask.tolist()] * model.layers,
        "cached": [model.sliding_window] * model.layers,
        "frequencies": [
            round(float(f), 12) for f in inverse_frequencies(model.rope, model.head_dim)
        ],
        "attention_factor": round(attention_factor(model.rope), 9),
    }


def check(family: str, change: dict[str, Any]) -> None:
    config = {**PLAIN, "model_type": family, **change}
    config = {key: value for key, value in config.items() if value is not MISSING}
    try:
        model = model_from_hf(config, name="m", where="here")
    except ConfigError as error:
        assert all(line.startswith("here: ") for line in str(error).splitlines()), str(error)
        return
    assert theirs(config) in (None, ours(model))
    written = hf_from_model(model)
    assert ours(model_from_hf(written, name="m", where="back")) == ours(model)


FORMS = settings(
    max_examples=200,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_every_key(family: str) -> None:
    """One key at a time: each value that means something, each odd one, and none at all."""
    for key, meant in MEANT.items():
        for value in [*meant, *ODD, MISSING]:
            check(family, {key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_embeddings_in_both_spellings(family: str) -> None:
    for older, newer in itertools.product(ROPES, ROPES):
        check(family, {"rope_scaling": older, "rope_parameters": newer})
    for rope, place in itertools.product((YARN, LLAMA3), ("rope_scaling", "rope_parameters")):
        for base, original in itertools.product((MISSING, 1e6), (MISSING, 16, 32, None)):
            keys = {"rope_theta": base, "original_max_position_embeddings": original}
            check(family, {place: rope, **keys})


@pytest.mark.parametrize("family", FAMILIES)
def test_windows(family: str) -> None:
    keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    values = ([MISSING, True], [MISSING, None, 8], [MISSING, 0, 1, 2], [MISSING, *MEANT[keys[3]]])
    for chosen in itertools.product(*values):
        check(family, dict(zip(keys, chosen, strict=True)))


@FORMS
@given(st.sampled_from(FAMILIES), changes())
def test_every_form_of_a_config(family: str, change: dict[str, Any]) -> None:
    check(family, change)
