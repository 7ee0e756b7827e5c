"""Any folder: what is read is what ``transformers`` reads, or it is refused by name.

Everything here goes through :class:`MegatronView`, which ``import`` and ``checkpoint.load=hf:``
share.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import TTTConfig
from megatron_ttt.conversion.exporting import Style
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.manifest import described_model
from megatron_ttt.conversion.source import MegatronView, described_ttt
from megatron_ttt.rule import TARGET_PARAMETERS, Clip, ClipMode, Normalize
from tests.unit.conversion.folders import (
    QWEN3,
    assert_equal_tensors,
    export_folder,
    import_folder,
    read_hf,
    write_hf,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {**QWEN3, "tie_word_embeddings": True}
LIVE = {**QWEN3, "ttt_mode": True, "ttt_layers": [1], "ttt_lr": 0.5, "ttt_chunk": 16}


def view(folder: Path) -> MegatronView:
    return MegatronView(HFFolder(folder), seed=3)


def change_weights(folder: Path, act: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    act(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **keys}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_tied_output_layer_must_be_the_embedding(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", TIED)
    copy = tensors[EMBEDDING].clone()
    change_weights(tmp_path / "hf", lambda t: t.update({HEAD: copy}))
    assert view(tmp_path / "hf").model.tied_embeddings
    copy[77, 5] += 1
    change_weights(tmp_path / "hf", lambda t: t.update({HEAD: copy}))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings is true, but lm_head.weight diff"):
        view(tmp_path / "hf")
    change_weights(tmp_path / "hf", lambda t: t.update({HEAD: copy[:50].clone()}))
    with pytest.raises(ConfigError, match=r"lm_head.weight differs"):
        view(tmp_path / "hf")


def both_answers(folder: Path) -> None:
    """A whole file beside shards: transformers reads the whole file."""
    save_file(read_hf(folder), folder / WEIGHTS)


def doubled(folder: Path) -> None:
    tensors = load_file(folder / "model-0.safetensors")
    other = load_file(folder / "model-1.safetensors")
    other[EMBEDDING] = tensors.get(EMBEDDING, other.get(EMBEDDING)).clone()
    tensors[EMBEDDING] = other[EMBEDDING].clone()
    save_file(tensors, folder / "model-0.safetensors")
    save_file(other, folder / "model-1.safetensors")


def index_of(value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": value}))

    return write


def extra(name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        path = folder / "model-0.safetensors"
        save_file({**load_file(path), name: torch.ones(3)}, path)

    return add


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "whole file beside shards": (both_answers, "which transformers reads, and"),
    "doubled tensor": (doubled, f"{EMBEDDING} is in model-0.safetensors and in model-1"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "holds an adapter",
    ),
    "index of numbers": (index_of({EMBEDDING: 3}), "gives 3 for"),
    "index of lists": (index_of({EMBEDDING: ["a"]}), "a file of this folder"),
    "index elsewhere": (index_of({EMBEDDING: "../other.safetensors"}), "a file of this folder"),
    "index of a lost file": (index_of({EMBEDDING: "gone.safetensors"}), "are missing: gone"),
    "pointer": (
        lambda f: (f / "model-0.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"
        ),
        "git lfs pull",
    ),
    "query bias": (extra("model.layers.0.self_attn.q_proj.bias"), "without a place"),
    "an expert": (extra("model.layers.0.mlp.experts.0.up_proj.weight"), "without a place"),
    "a scale": (extra("model.layers.0.mlp.up_proj.weight_scale"), "without a place"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 10**5), "nested too deeply"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_folders(name: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3, files=2)
    act, words = REFUSED[name]
    act(tmp_path / "hf")
    with pytest.raises(ConfigError) as caught:
        view(tmp_path / "hf")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_files_that_transformers_does_not_read_change_nothing(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", QWEN3)
    other = {name: torch.ones(2, 2) for name in ("tok_embeddings.weight", EMBEDDING)}
    save_file(other, tmp_path / "hf" / "consolidated.safetensors")
    save_file(other, tmp_path / "hf" / "model-00001-of-00002.safetensors")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"other weights")
    weights = dict.fromkeys(tensors, WEIGHTS)
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": weights}))
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert_equal_tensors(export_folder(tmp_path / "megatron", tmp_path / "back"), tensors)


COMPANIONS = {
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "x"}]}',
    "tokenizer.model": "pieces",
    "tokenizer.model.v3": "pieces",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "LICENSE": "terms",
}


def test_everything_beside_the_weights_comes_back(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    for name, text in COMPANIONS.items():
        (tmp_path / "hf" / name).write_text(text)
    (tmp_path / "hf" / "README.md").write_text("about other weights")
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    shutil.rmtree(tmp_path / "hf")
    export_folder(tmp_path / "megatron", tmp_path / "back")
    found = {str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*")}
    for name, text in COMPANIONS.items():
        assert (tmp_path / "back" / name).read_text() == text
    assert "README.md" not in found


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"quantization_config": {}}, "quantization_config"),
    ],
)
def test_a_tokenizer_folder_cannot_change_the_function(
    keys: dict[str, Any], word: str, tmp_path: Path
) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    change_config(tmp_path / "megatron" / "hf", **keys)
    with pytest.raises(ConfigError, match=word):
        export_folder(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_fast_weights_that_nothing_describes(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", LIVE)
    change_config(tmp_path / "hf", **{key: ... for key in LIVE if key.startswith("ttt_")})
    folder = HFFolder(tmp_path / "hf")
    for known in ({}, {"chunk_size": 16}, {"eta": 0.5}):
        with pytest.raises(ConfigError, match=r"layers \[1\].*ttt.chunk_size and ttt.eta"):
            described_ttt(folder, layers=None, **known)
    with pytest.raises(ConfigError, match=r"give ttt\.chunk_size"):
        view(tmp_path / "hf")
    target, ttt = described_ttt(folder, layers=None, chunk_size=16, eta=0.5)
    assert (target.layers, target.parameters) == ((1,), TARGET_PARAMETERS)
    assert (ttt.layers, ttt.chunk_size, ttt.eta) == ([1], 16, 0.5)
    import_folder(tmp_path / "hf", tmp_path / "megatron", ttt=ttt)
    assert_equal_tensors(export_folder(tmp_path / "megatron", tmp_path / "back"), tensors)


def test_a_mode_that_is_left_out_is_on(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LIVE)
    change_config(tmp_path / "hf", ttt_mode=..., ttt_layers=...)
    _, ttt = described_ttt(HFFolder(tmp_path / "hf"), layers=None)
    assert (ttt.layers, ttt.eta, ttt.chunk_size) == ([1], 0.5, 16)
    change_config(tmp_path / "hf", ttt_mode=False)
    target, ttt = described_ttt(HFFolder(tmp_path / "hf"), layers=None)
    assert target.layers == () and ttt.mode.name == "off"


def test_published_layers_end_at_30(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", {**QWEN3, "num_hidden_layers": 40})
    change_config(tmp_path / "hf", ttt_chunk=64)
    _, ttt = described_ttt(HFFolder(tmp_path / "hf"), layers=None)
    assert ttt.layers == [0, 6, 12, 18, 24, 30]


def test_half_a_target_generator_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LIVE)
    change_weights(tmp_path / "hf", lambda t: t.pop("model.layers.1.mlp.ttt_conv.weight"))
    change_config(tmp_path / "hf", ttt_conv=True)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.ttt_conv\.weight"):
        view(tmp_path / "hf")


def test_layers_must_be_those_of_the_tensors(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LIVE)
    change_config(tmp_path / "hf", ttt_layers=[0, 1])
    with pytest.raises(ConfigError, match=r"ttt_layers=\[0,1\]: the files have .* layers \[1\]"):
        view(tmp_path / "hf")


def test_fast_weights_are_never_left_out_in_silence(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LIVE)
    target, _ = described_ttt(HFFolder(tmp_path / "hf"), layers=[0])
    with pytest.warns(UserWarning, match=r"left out: model\.layers\.1\.mlp\.ttt_conv"):
        MegatronView(HFFolder(tmp_path / "hf"), target=target, seed=1)


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ({"normalize": Normalize.key_energy}, "ttt.normalize=key_energy"),
        ({"decay": 0.9}, "ttt.decay=0.9"),
        ({"clip": Clip(ClipMode.relative, 0.2)}, "ttt.clip.mode=relative"),
    ],
)
def test_the_reference_style_refuses_what_it_cannot_say(
    rule: dict[str, Any], key: str, tmp_path: Path
) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    ttt = TTTConfig(layers=[1], chunk_size=8, **rule)
    import_folder(tmp_path / "hf", tmp_path / "megatron", ttt=ttt)
    with pytest.raises(ConfigError, match="reference implementation has none") as caught:
        export_folder(tmp_path / "megatron", tmp_path / "back")
    assert str(caught.value).startswith(key)
    export_folder(tmp_path / "megatron", tmp_path / "package", style=Style.package)
    assert not (tmp_path / "back").exists()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.text(max_size=3),
    st.lists(st.integers(-1, 9), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FORMS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and its import."""
    path = tmp_path_factory.mktemp("forms")
    write_hf(path / "hf", QWEN3)
    import_folder(path / "hf", path / "megatron")
    return path / "hf", path / "megatron"


@FORMS
@given(
    st.sampled_from(["model.norm.weight", EMBEDDING, "new", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets", None]),
    st.one_of(ODD, st.sampled_from(["F32", "BF16", "F8_E4M3", [24], [23], [0, 48], [0, 0]])),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_any_header_of_safetensors(
    folders: tuple[Path, Path], name: str, key: str | None, value: Any, length: int | None
) -> None:
    source, _ = folders
    data = (source / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if key is None:
        header[name] = value
    else:
        header.setdefault(name, {})[key] = value
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    folder = source.with_name("changed")
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", folder / "config.json")
    changed = size.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]
    (folder / WEIGHTS).write_bytes(changed)
    try:
        opened = view(folder)
    except ConfigError as error:
        assert all("checkpoint=" in line for line in str(error).splitlines())
        return
    stored = view(source)
    for tensor in stored.mapping.tensors:  # what is accepted has the same values
        rows = opened.rows(tensor, 0, tensor.shape[0])
        assert torch.equal(rows, stored.rows(tensor, 0, tensor.shape[0]))


@FORMS
@given(
    st.lists(
        st.sampled_from(["facts", "config", "model", "ttt", "rope", "layers", "files", "clip"]),
        max_size=4,
    ),
    ODD,
)
def test_any_manifest(folders: tuple[Path, Path], keys: list[str], value: Any) -> None:
    _, imported = folders
    folder = imported.with_name("manifest")
    if not folder.exists():
        shutil.copytree(imported, folder)
    content: Any = json.loads((imported / "manifest.json").read_text())
    inner = content
    for key in keys[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    if keys:
        inner[keys[-1]] = value
    else:
        content = value
    (folder / "manifest.json").write_text(json.dumps(content))
    try:
        model, _ = described_model(MegatronFolder(folder))
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert isinstance(model.layers, int)
