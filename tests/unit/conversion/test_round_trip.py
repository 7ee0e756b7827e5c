"""Hugging Face -> Megatron -> Hugging Face: equal bits, whatever the blocks and files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.checkpoints.manifest import check_files, read_manifest
from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import OptimizerForm, TTTConfig
from megatron_ttt.conversion.difference import differences
from megatron_ttt.conversion.exporting import Style
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.importing import CONTENT
from megatron_ttt.conversion.ttt_config import ttt_from_hf
from megatron_ttt.rule import Conv
from megatron_ttt.training.checkpoint import content
from tests.unit.conversion.folders import (
    QWEN3,
    assert_equal_tensors,
    export_folder,
    import_folder,
    read_hf,
    write_hf,
)

FAST = TTTConfig(layers=[1], chunk_size=8, eta=0.1)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3,
    "qwen3 tied": {**QWEN3, "tie_word_embeddings": True},
    "llama with biases": {**QWEN3, "model_type": "llama", "attention_bias": True},
    "qwen2": {**QWEN3, "model_type": "qwen2"},
    "mistral": {**QWEN3, "model_type": "mistral", "sliding_window": 8},
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("files", [1, 3])
def test_equal_bits(config: dict[str, Any], files: int, tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", config, files=files)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert_equal_tensors(export_folder(tmp_path / "megatron", tmp_path / "back"), tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert list(differences(tmp_path / "hf", tmp_path / "back")) == []
    assert list(differences(tmp_path / "hf", tmp_path / "megatron")) == []


@pytest.mark.parametrize("fast", [False, True])
def test_llama_with_a_window(fast: bool, tmp_path: Path) -> None:
    """Without fast weights it is Mistral; with them our classes have the window."""
    llama = {**QWEN3, "model_type": "llama", "attention_bias": False}
    tensors = write_hf(tmp_path / "hf", llama)
    import_folder(tmp_path / "hf", tmp_path / "megatron", ttt=FAST if fast else None, window=8)
    back = export_folder(tmp_path / "megatron", tmp_path / "back", style=Style.package)
    assert_equal_tensors({name: back[name] for name in tensors}, tensors)
    config = HFFolder(tmp_path / "back").config
    assert config["sliding_window"] == 8
    names = ("llama_ttt", "LlamaTTTForCausalLM") if fast else ("mistral", "MistralForCausalLM")
    assert (config["model_type"], *config["architectures"]) == names
    read = model_from_hf(config, name="m", where="back")
    assert (read.family.name, read.sliding_window) == (names[0].removesuffix("_ttt"), 8)


def test_llama_with_a_window_and_biases_has_no_plain_architecture(tmp_path: Path) -> None:
    llama = {**QWEN3, "model_type": "llama", "attention_bias": True}
    write_hf(tmp_path / "hf", llama)
    import_folder(tmp_path / "hf", tmp_path / "megatron", window=8)
    with pytest.raises(ConfigError, match=r"^model\.sliding_window=8: no plain architecture"):
        export_folder(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("write", ["plain", "gated", "bounded"])
def test_checkpoints_with_fast_weights(write: str, tmp_path: Path) -> None:
    """Those of the reference implementation, and those of the other write rules."""
    config = {**QWEN3, "ttt_mode": True, "ttt_layers": [1], "ttt_lr": 0.5, "ttt_chunk": 16}
    style = Style.reference
    if write != "plain":  # which the reference implementation does not know
        style = Style.package
        config |= {"model_type": "qwen3_ttt", "ttt_write": write, "ttt_write_bound": 0.2}
    tensors = write_hf(tmp_path / "hf", config)
    gate = {"ttt_gate", "ttt_gate_bias"} if write == "gated" else set()
    assert {name for name in tensors if "ttt" in name} == {
        f"model.layers.1.mlp.{part}.weight" for part in {"ttt_conv", "ttt_proj"} | gate
    }
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    back = export_folder(tmp_path / "megatron", tmp_path / "back", style=style)
    assert_equal_tensors(back, tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in config} == config


def test_manifest_is_that_of_a_training_checkpoint(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    manifest = read_manifest(tmp_path / "megatron")
    check_files(tmp_path / "megatron", manifest.files)
    assert manifest.progress.step == 0
    assert content(OptimizerForm.fully_reshardable) == CONTENT


def test_plain_checkpoints_get_a_target_generator(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    both = TTTConfig(layers=[0, 1])
    import_folder(tmp_path / "hf", tmp_path / "megatron", ttt=both, seed=5)
    back = export_folder(tmp_path / "megatron", tmp_path / "back")
    projections = [back[f"model.layers.{layer}.mlp.ttt_proj.weight"] for layer in (0, 1)]
    for layer, projection in enumerate(projections):
        assert not back[f"model.layers.{layer}.mlp.ttt_conv.weight"].any()
        assert torch.equal(projection, projection.diagonal().diag())
        assert projection.diagonal().all()
        assert 0.005 < projection.diagonal().float().std() < 0.05
    assert not torch.equal(*projections)
    import_folder(tmp_path / "hf", tmp_path / "same", ttt=both, seed=5)
    import_folder(tmp_path / "hf", tmp_path / "other", ttt=both, seed=6)
    assert list(differences(tmp_path / "megatron", tmp_path / "same")) == []
    changed = [difference.name for difference in differences(tmp_path / "same", tmp_path / "other")]
    assert changed == [f"decoder.layers.{layer}.mlp.ttt_proj.weight" for layer in (0, 1)]


def test_no_convolution_is_exported_as_the_identity(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron", ttt=TTTConfig(layers=[1], conv=Conv.off))
    assert not [name for name in MegatronFolder(tmp_path / "megatron").tensors if "conv" in name]
    kernel = export_folder(tmp_path / "megatron", tmp_path / "back")[
        "model.layers.1.mlp.ttt_conv.weight"
    ]
    assert kernel.shape == (24, 1, 5)
    assert torch.equal(kernel[:, 0].unique(dim=0), torch.tensor([[0, 0, 1, 0, 0]]).bfloat16())


@pytest.mark.parametrize(
    ("ttt", "kernel"),
    [
        (TTTConfig(layers=[1], conv=Conv.next_token), None),
        (TTTConfig(layers=[1], conv=Conv.causal, kernel_size=4), (24, 1, 4)),
        (TTTConfig(layers=[1], kernel_size=3), (24, 1, 3)),
    ],
)
def test_convolutions_survive_the_round_trip(
    ttt: TTTConfig, kernel: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """There and back by files; a kernel that the published classes lack is not theirs to read."""
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron", ttt=ttt)
    with pytest.raises(ConfigError, match="the reference implementation has none"):
        export_folder(tmp_path / "megatron", tmp_path / "refused")
    tensors = export_folder(tmp_path / "megatron", tmp_path / "back", style=Style.package)
    found = tensors.get("model.layers.1.mlp.ttt_conv.weight")
    assert kernel == (None if found is None else tuple(found.shape))
    opened = HFFolder(tmp_path / "back")
    again = ttt_from_hf(opened.config, layers=2, where="back", tensors=opened.tensors)
    assert again == ttt
    import_folder(tmp_path / "back", tmp_path / "again", ttt=again)
    assert not list(differences(tmp_path / "megatron", tmp_path / "again"))


def test_files_of_before_there_were_words_for_the_convolution() -> None:
    for said, conv in ((True, Conv.learned), (False, Conv.off)):
        ttt = ttt_from_hf({"ttt_layers": [0], "ttt_conv": said}, layers=2, where="here")
        assert ttt is not None and ttt.conv is conv


def test_dtype_of_an_export(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", QWEN3, dtype=torch.float32)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    back = export_folder(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16)
    assert_equal_tensors(back, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_bias_without_a_place_is_refused_unless_zero(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = write_hf(tmp_path / "hf", {**QWEN3, "attention_bias": True})
    tensors["model.layers.1.self_attn.o_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        import_folder(tmp_path / "hf", tmp_path / "megatron")


def test_what_fast_weights_add_is_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export beside the model it began with: equal, but for the target generator."""
    from tools.convert_checkpoint import main

    write_hf(tmp_path / "plain", QWEN3)
    import_folder(tmp_path / "plain", tmp_path / "megatron", ttt=TTTConfig(layers=[0]))
    assert main(["diff", str(tmp_path / "megatron"), str(tmp_path / "plain")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "equal in all that both have; 2 tensors of fast weights on one side alone"
    assert [line.split(":")[1] for line in lines] == [" only in the first"] * 2


def test_differences_name_what_differs(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = write_hf(tmp_path / "a", QWEN3)
    import_folder(tmp_path / "a", tmp_path / "megatron")
    write_hf(tmp_path / "b", QWEN3)
    tensors["model.layers.1.self_attn.k_proj.weight"][13, 5] += 2
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    assert [d.name for d in differences(tmp_path / "a", tmp_path / "b")] == [
        "model.layers.1.self_attn.k_proj.weight"
    ]
    (found,) = differences(tmp_path / "megatron", tmp_path / "b")
    assert found.name == "decoder.layers.1.self_attention.linear_qkv.weight"
    assert found.largest == pytest.approx(2, rel=0.02)
    tensors["model.norm.weight"] = tensors.pop("model.norm.weight").float()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    texts = {d.name: d.what for d in differences(tmp_path / "a", tmp_path / "b")}
    assert texts["model.norm.weight"] == "dtype torch.bfloat16 and torch.float32"
    assert read_hf(tmp_path / "b").keys() == tensors.keys()
