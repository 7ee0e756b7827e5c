"""``config.json`` both ways: nothing is lost, nothing is guessed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.load import CONFIG_DIR, load_config
from megatron_ttt.config.overrides import group_options
from megatron_ttt.config.schema import RopeConfig, RopeScaling, TTTConfig
from megatron_ttt.conversion.hf_config import check_agreement, hf_from_model, model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.source import described_ttt
from megatron_ttt.conversion.ttt_config import hf_from_ttt, ttt_from_hf
from megatron_ttt.rule import Clip, ClipMode, Normalize, TargetSource
from tests.unit.conversion.folders import QWEN3, write_hf


def read(config: dict[str, Any]) -> Any:
    return model_from_hf(config, name="m", where="here")


@pytest.mark.parametrize("name", group_options(CONFIG_DIR)["model"])
def test_every_model_of_ours_survives_the_round_trip(name: str) -> None:
    model = load_config([f"+model={name}", "run.dry_run=true"]).model
    check_agreement(model, read(hf_from_model(model)), "here")


def test_transformers_reads_what_we_write() -> None:
    transformers = pytest.importorskip("transformers")
    model = load_config(["+model=llama3_1_8b", "run.dry_run=true"]).model
    config = transformers.LlamaConfig.from_dict(hf_from_model(model))
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (4096, 128, 8)
    written = read(config.to_dict())  # transformers' own spelling of the rotary keys
    check_agreement(model, written, "here")
    assert written.rope.scaling is RopeScaling.llama3


def test_yarn_in_both_spellings() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0}
    older = {**QWEN3, "rope_scaling": {"type": "yarn", **yarn}}
    newer = {key: value for key, value in QWEN3.items() if key != "rope_theta"}
    newer["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6, **yarn}
    expected = RopeConfig(
        base=1e6,
        scaling=RopeScaling.yarn,
        factor=4.0,
        original_max_positions=16,
        beta_fast=20.0,
    )
    assert read(older).rope == read(newer).rope == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
            "attention_factor",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "window"),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "window",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
            "rope_scaling=.*differs from rope_parameters",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta=500000.0: the rope_theta outside"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                },
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings=32: the one outside is 16",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor=null: is miss"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}, "truncate"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings=false: must be true or false"),
        ({"hidden_size": "24"}, "hidden_size=24: must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be a finite number"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_what_has_no_place_is_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read({**QWEN3, **change})


def test_disagreement_lists_every_key_under_both_names() -> None:
    model = read(QWEN3)
    other = read({**QWEN3, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_key_value_heads": 4})
    with pytest.raises(ConfigError) as caught:
        check_agreement(model, other, "here")
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "model.kv_groups",
        "model.norm_epsilon",
        "model.rope.base",
    ]
    assert "num_key_value_heads=4" in lines[0] and "rope_theta=10000.0" in lines[2]


def test_yarn_may_stretch_a_checkpoint_and_nothing_else() -> None:
    plain = read(QWEN3)
    yarn = RopeConfig(
        base=1e6, scaling=RopeScaling.yarn, factor=4.0, original_max_positions=plain.max_positions
    )
    check_agreement(replace(plain, rope=yarn, max_positions=256), plain, "here")
    with pytest.raises(ConfigError, match=r"model\.rope\.scaling"):
        wrong = replace(yarn, original_max_positions=32)
        check_agreement(replace(plain, rope=wrong, max_positions=256), plain, "here")
    with pytest.raises(ConfigError, match=r"model\.rope\.base"):
        check_agreement(replace(plain, rope=replace(yarn, base=1e4)), plain, "here")


def test_more_positions_than_the_checkpoint_has_are_a_choice_with_a_notice() -> None:
    plain = read(QWEN3)
    more = 2 * plain.max_positions
    (notice,) = check_agreement(replace(plain, max_positions=more), plain, "here")
    assert f"max_positions={more}," in notice and f"embeddings={more // 2} (here)" in notice
    with pytest.raises(ConfigError, match=r"^model\.max_positions="):
        check_agreement(replace(plain, max_positions=more // 4), plain, "here")


def test_the_published_list_of_layers_ends_one_past_the_last(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", {**QWEN3, "num_hidden_layers": 6})
    source = HFFolder(tmp_path / "hf")
    with pytest.warns(UserWarning, match="ttt.layers: 6 is left out: layers are 0 to 5"):
        target, ttt = described_ttt(source, layers=[0, 3, 6])
    assert target.layers == (0, 3) and ttt.layers == [0, 3]
    for wrong in ([0, 7], [6], [-1, 0]):
        with pytest.raises(ConfigError, match="layers are 0 to 5"):
            described_ttt(source, layers=wrong)


def test_fast_weights_survive_the_round_trip() -> None:
    ttt = TTTConfig(
        layers=[0, 3],
        chunk_size=64,
        eta=0.7,
        normalize=Normalize.key_energy,
        target=TargetSource.input_embeddings,
        decay=0.9,
        clip=Clip(ClipMode.relative, 0.2),
    )
    assert ttt_from_hf(hf_from_ttt(ttt, layers=4), layers=4, where="here") == ttt


def test_published_configurations_have_the_published_defaults() -> None:
    assert ttt_from_hf({}, layers=4, where="here") is None
    with pytest.warns(UserWarning, match=r"\[36\] are dropped"):
        ttt = ttt_from_hf({"ttt_mode": True, "ttt_layers": [0, 6, 36]}, layers=36, where="here")
    assert ttt is not None
    assert (ttt.layers, ttt.eta, ttt.chunk_size, ttt.proj) == ([0, 6], 0.3, 8192, True)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("window", [{}, {"use_sliding_window": True}])
def test_keys_left_out_mean_what_they_mean_to_transformers(
    model_type: str, window: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    config = {key: QWEN3[key] for key in needed} | {"num_attention_heads": 64, **window}
    config |= {"max_position_embeddings": 64, "hidden_size": 384}
    theirs = transformers.AutoConfig.for_model(model_type, **config)
    ours = read({**config, "model_type": model_type})
    slides = set(getattr(theirs, "layer_types", None) or ["sliding_attention"])
    expected = getattr(theirs, "sliding_window", None) if slides != {"full_attention"} else None
    assert ours.sliding_window == expected
    assert ours.kv_groups == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 384 // 64)
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope.base == theirs.rope_parameters["rope_theta"]
    assert ours.initializer_range == theirs.initializer_range


def test_floats_that_fp32_does_not_tell_apart_are_equal() -> None:
    """GGUF stores 1e-5 in fp32, and a configuration made of it says 9.999999747378752e-06."""
    stored = read({**QWEN3, "rms_norm_eps": 9.999999747378752e-06})
    assert check_agreement(replace(stored, norm_epsilon=1e-5), stored, "here") == []
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        check_agreement(replace(stored, norm_epsilon=1.0001e-5), stored, "here")
