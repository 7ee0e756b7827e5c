"""A text folded into plain weights: what transformers computes with them, and what it is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.inference import baking
from megatron_ttt.inference.baking import Distance, distance, plain_config, write_plain
from tests.unit.hf.models import CHUNK, live_model
from tools.bake import main

LENGTH = 3 * CHUNK + 5  # the last five tokens are in no whole chunk


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(draw.choice("abcdefgh ") for _ in range(LENGTH)))
    return path


@pytest.fixture
def baked(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], Path]]:
    def call(model: Any, *words: str) -> tuple[dict[str, Any], Path]:
        """The report, and the folder, whose printed lines name the losses."""
        model.save_pretrained(tmp_path / "exported")
        out = tmp_path / "baked"
        options = ["tokenizer=bytes", "probe_tokens=20", f"read={text}", *words]
        assert main([*places(tmp_path / "exported", out), *options]) == 0
        report = json.loads((out / "bake.json").read_text())
        assert f"baked {report['losses']['baked']:.4f}" in capsys.readouterr().out
        return report, out

    return call


def places(checkpoint: Path, output: Path) -> tuple[str, str]:
    return f"checkpoint={checkpoint}", f"output={output}"


@torch.no_grad()
def folded(model: Any, tokens: list[int], *, until: int) -> dict[str, torch.Tensor]:
    """``W0 + eta * S`` after the first ``until`` tokens, by an independent walk over the chunks."""
    states: dict[int, torch.Tensor] = {}
    keys: dict[int, torch.Tensor] = {}
    sources: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in model.config.ttt_layers:
        mlp = model.model.layers[layer].mlp

        def keep(module: Any, inputs: Any, *_: Any, layer: int = layer) -> None:
            hidden = inputs[0][0]
            gate = torch.nn.functional.silu(module.gate_proj(hidden))
            keys[layer], sources[layer] = gate * module.up_proj(hidden), hidden

        hooks.append(mlp.register_forward_pre_hook(keep))
    model(torch.tensor([tokens[:until]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer in model.config.ttt_layers:
        mlp = model.model.layers[layer].mlp
        state = torch.zeros_like(mlp.down_proj.weight)
        for first in range(0, until, CHUNK):
            source = sources[layer][first : min(first + CHUNK, until)].T[None]
            conv = torch.nn.functional.conv1d(
                source, mlp.ttt_conv.weight, padding=2, groups=source.shape[1]
            )
            target = conv[0].T @ mlp.ttt_proj.weight
            state += target.T @ keys[layer][first : min(first + CHUNK, until)]
        states[f"model.layers.{layer}.mlp.down_proj.weight"] = (
            mlp.down_proj.weight + model.config.ttt_lr * state
        )
    return states


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_any_engine_computes_what_the_model_remembers(
    family: str, tied: bool, baked: Callable[..., Any], text: Path
) -> None:
    model = live_model(family, dtype=torch.float32, vocab_size=258, tie_word_embeddings=tied)
    report, out = baked(model)
    assert report["tokens_read"] == LENGTH
    assert all(0.05 < ratio < 0.4 for ratio in report["update_ratios"].values())
    assert report["frozen"]["largest"] < 1e-5 and report["frozen"]["divergence"] < 1e-9
    assert report["live"]["largest"] > 100 * report["frozen"]["largest"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == family
    assert not [key for key in config if key.startswith("ttt_") or key == "auto_map"]
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert "ttt" not in type(plain).__name__.lower()
    weights = dict(plain.named_parameters())
    assert not [name for name in weights if "ttt" in name]
    tokens = list(text.read_bytes())
    for name, wanted in folded(model, tokens, until=LENGTH).items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-5)
        unflushed = folded(model, tokens, until=3 * CHUNK)[name]
        assert (weights[name] - unflushed).norm() > 1e-2
    untouched = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights[untouched], dict(model.named_parameters())[untouched])


def test_llama_with_a_window_is_baked_as_mistral(baked: Callable[..., Any]) -> None:
    model = live_model("llama", dtype=torch.float32, vocab_size=258, sliding_window=7)
    report, out = baked(model)
    assert report["frozen"]["largest"] < 1e-5 and report["frozen"]["divergence"] < 1e-9
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 7)


def test_what_no_plain_architecture_computes_is_refused_unread(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"vocab_size": 258, "sliding_window": 7, "attention_bias": True}
    live_model("llama", dtype=torch.float32, **keys).save_pretrained(tmp_path / "exported")
    monkeypatch.setattr(baking, "read_text", lambda *args, **more: pytest.fail("it was read"))
    words = [*places(tmp_path / "exported", tmp_path / "baked"), "tokenizer=bytes", f"read={text}"]
    capsys.readouterr()
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("model.sliding_window=7: no plain architecture has a window and biases")
    assert not (tmp_path / "baked").exists()


def test_the_sum_alone_is_rounded(tmp_path: Path) -> None:
    model = live_model(dtype=torch.float32, vocab_size=258)
    model.save_pretrained(tmp_path / "exported")
    name, eta = "model.layers.0.mlp.down_proj.weight", 0.3
    trained = dict(model.named_parameters())[name]
    matrix = torch.randn(trained.shape, generator=torch.Generator().manual_seed(3))
    opened = HFFolder(tmp_path / "exported")
    write_plain(
        opened,
        tmp_path / "baked",
        {0: matrix},
        config=plain_config(opened.config),
        eta=eta,
        shard_bytes=1 << 30,
        check=lambda folder: None,
    )
    wanted = (trained.double() + eta * matrix.double()).float()
    assert torch.equal(load_file(tmp_path / "baked" / "model.safetensors")[name], wanted)
    assert not torch.equal(trained + eta * matrix, wanted)  # the product rounded, then the sum


def test_the_architecture_is_named_where_the_source_does_not() -> None:
    for names in (None, ["Qwen3TTTForCausalLM"], ["Qwen3ForCausalLM"]):
        config = {"model_type": "qwen3_ttt", "architectures": names, "ttt_mode": True}
        assert plain_config(config) == {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
        }


def test_a_taken_place_beside_is_left_alone(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metadata.json").write_text("{}")
    (tmp_path / "baked.exported").mkdir()
    mine = tmp_path / "baked.exported" / "mine.txt"
    mine.write_text("kept")
    assert main([*places(tmp_path / "run", tmp_path / "baked"), f"read={text}"]) == 2
    assert "baked.exported: exists" in capsys.readouterr().err
    assert mine.read_text() == "kept"


def test_several_ranks_are_refused(
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*places(tmp_path, tmp_path / "baked"), f"read={text}"]) == 2
    assert "a model is baked by one process, the job has 2" in capsys.readouterr().err


def test_low_precision_computes_what_the_model_computes(baked: Callable[..., Any]) -> None:
    model = live_model(dtype=torch.float32, vocab_size=258).to(torch.bfloat16)
    report, out = baked(model)
    assert report["frozen"] == asdict(Distance(0.0, 0.0))  # the very same matrices
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_distance_of_known_logits() -> None:
    one = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    assert distance(one, one) == Distance(0.0, 0.0)
    other = torch.tensor([[0.0, 0.0], [4.0, 1.0]])
    found = distance(one, other)
    assert found.largest == pytest.approx(1 / 4)
    p = torch.tensor([4.0, 0.0]).softmax(0)
    q = torch.tensor([4.0, 1.0]).softmax(0)
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum()) / 2)


def test_mistakes_take_one_line_and_leave_nothing(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plain, out = tmp_path / "exported", tmp_path / "plain", tmp_path / "baked"
    live_model(dtype=torch.float32, vocab_size=258, max_position_embeddings=30).save_pretrained(
        model
    )
    live_model(dtype=torch.float32, vocab_size=258, ttt_mode=True).save_pretrained(plain)
    diverging = live_model(dtype=torch.float32, vocab_size=258)
    torch.nn.init.constant_(diverging.model.layers[2].mlp.ttt_proj.weight, 3e38)
    diverging.save_pretrained(tmp_path / "diverging")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "ttt_mode": False}))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "there").mkdir()
    long = tmp_path / "long.txt"
    long.write_text("x" * 40)
    read = [f"read={text}", "tokenizer=bytes"]
    mistakes = [
        ([*places(model, out)], "there is nothing to fold: give read= or memory="),
        ([*places(model, tmp_path / "there"), *read], "there: exists"),
        ([*places(tmp_path / "no", out), *read], "no: is not a folder"),
        ([*places(plain, out), *read], "plain: has no fast weights to fold"),
        ([*places(model, out), f"read={text}"], "exported: has no tokenizer"),
        (
            [*places(model, out), f"read={tmp_path / 'empty.txt'}", "tokenizer=bytes"],
            "empty.txt: the text is empty",
        ),
        (
            [*places(model, out), f"read={tmp_path / 'none'}", "tokenizer=bytes"],
            "none: cannot be read",
        ),
        (
            [*places(model, out), f"read={long}", "tokenizer=bytes"],
            "40 tokens, but the model has 30 positions (beyond_positions=true",
        ),
        ([*places(model, out), *read, "memory=no.memory"], "no.memory"),
        ([*places(model, out), *read, "probe_tokens=0"], "probe_tokens=0: must be"),
        ([*places(model, out), *read, "ttt.decay=2"], "ttt.decay=2.0: must lie in (0, 1]"),
        ([*places(model, out), *read, "ttt.decay=x"], "ttt.decay=x: must be a number"),
        (
            [*places(tmp_path / "diverging", out), *read],
            "layers 2: the state is not finite after 29 tokens: nothing to fold; lower ttt.eta",
        ),
        ([*places(model, out), *read, "ttt.eta=1e38"], "ttt.eta=1e+38: must be at most 1000000"),
        (
            [*places(model, out), *read, "ttt.rate=2"],
            "ttt.rate=2: no such key; ttt has mode, ",
        ),
    ]
    for words, said in mistakes:
        capsys.readouterr()
        assert main(words) == 2, words
        printed = capsys.readouterr().err.splitlines()
        lines = [line for line in printed if line.strip() and "Loading weights" not in line]
        assert len(lines) == 1 and said in lines[0], lines
        assert not out.exists() and not list(tmp_path.glob("baked*"))
