"""Configurations, registration, exported folders with and without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import megatron_ttt
from megatron_ttt.hf import LlamaTTTConfig, Qwen3TTTConfig
from megatron_ttt.hf.auto_map import write_auto_map
from megatron_ttt.hf.versions import OLDEST, check_transformers
from tests.unit.hf.models import CHUNK, FAMILIES, SHAPE, live_model, tokens


def run_python(text: str, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_published_checkpoints_that_leave_keys_out() -> None:
    assert Qwen3TTTConfig(num_hidden_layers=40).ttt_layers == [0, 6, 12, 18, 24, 30]
    config = Qwen3TTTConfig(num_hidden_layers=13)
    assert (config.ttt_mode, config.ttt_lr, config.ttt_chunk) == (True, 0.3, 8192)
    assert (config.ttt_proj, config.ttt_conv, config.ttt_target) == (
        True,
        "learned",
        "hidden_states",
    )
    assert Qwen3TTTConfig(ttt_conv=False).ttt_conv == "off"  # as files of before say it
    assert config.ttt_layers == [0, 6, 12]


def test_a_layer_that_the_model_lacks_is_dropped_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"ttt_layers \[36\] are dropped.* 0 to 35") as warned:
        config = Qwen3TTTConfig(num_hidden_layers=36, ttt_layers=[30, 36, 0])
    assert len(warned) == 1
    assert config.ttt_layers == [0, 30]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ttt_chunk": 0}, "ttt_chunk=0: at least 1"),
        ({"ttt_decay": 1.5}, "ttt_decay=1.5"),
        ({"ttt_conv": "both"}, "ttt_conv='both': one of learned, next_token, causal, off"),
        ({"ttt_kernel_size": 4}, "ttt_kernel_size=4: must be odd"),
        ({"ttt_kernel_size": 0}, "ttt_kernel_size=0: must be 1 to 9"),
        ({"ttt_target": "logits"}, "ttt_target='logits': one of hidden_states, input_embed"),
        ({"ttt_normalize": "mean"}, "ttt_normalize='mean'"),
        ({"ttt_clip_mode": "relative", "ttt_clip_bound": 0}, "ttt_clip_bound=0: above 0"),
        ({"mlp_bias": True}, "has no bias"),
    ],
)
def test_values_that_mean_nothing(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LlamaTTTConfig(num_hidden_layers=4, **keys)
    assert message in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_auto_classes(family: str, tmp_path: Path) -> None:
    model = live_model(family, dtype=torch.float32, ttt_decay=0.9)
    model.save_pretrained(tmp_path)
    hidden = SHAPE["hidden_size"]
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.layers.2.mlp.ttt_conv.weight"].shape == (hidden, 1, 5)
    assert weights["model.layers.2.mlp.ttt_proj.weight"].shape == (hidden, hidden)
    assert not any(name.startswith("model.layers.1.mlp.ttt") for name in weights)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.ttt_decay == 0.9 and loaded.config.ttt_lr == model.config.ttt_lr
    ids = tokens(2, 2 * CHUNK + 1)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    off = AutoModelForCausalLM.from_pretrained(tmp_path, ttt_mode=False)
    assert not torch.equal(off(ids).logits, model(ids).logits)
    assert torch.equal(
        off.model.layers[0].mlp.ttt_conv.weight, model.model.layers[0].mlp.ttt_conv.weight
    )


def test_importing_needs_neither_megatron_nor_hydra(tmp_path: Path) -> None:
    names = run_python(
        """
        import sys, megatron_ttt.hf
        print(*sorted({name.split(".")[0] for name in sys.modules}))
        """,
        Path(megatron_ttt.__file__).parent.parent,
    ).split()
    assert "transformers" in names
    assert not {"megatron", "hydra", "omegaconf", "wandb"} & set(names)


def test_an_export_runs_where_the_package_is_not_installed(tmp_path: Path) -> None:
    ids = tokens(1, CHUNK + 3)
    wanted = []
    for family in ("qwen3", "mistral"):
        model = live_model(family, dtype=torch.float32)
        model.save_pretrained(tmp_path / family)
        write_auto_map(tmp_path / family)
        wanted.append(model.generate(ids, max_new_tokens=CHUNK, do_sample=False).tolist())
        # Where the package is installed, its classes are used and no foreign code is trusted.
        assert type(AutoConfig.from_pretrained(tmp_path / family)) is type(model.config)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / family)) is type(model)
    found = run_python(
        f"""
        import sys
        sys.modules["megatron_ttt"] = None  # any import of the package now fails
        import torch
        from transformers import AutoModelForCausalLM
        ids = torch.tensor({ids.tolist()})
        for family in ("qwen3", "mistral"):
            model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True)
            print(model.generate(ids, max_new_tokens={CHUNK}, do_sample=False).tolist())
        """,
        tmp_path,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert [json.loads(line) for line in found.splitlines()[-2:]] == wanted


def test_an_older_transformers_is_named_by_its_version() -> None:
    for version in ("5.20.0", "5.23.0.dev0", "6.0"):
        check_transformers(version)
    for version in ("4.57.1", "5.19.2", "5.9"):
        with pytest.raises(ImportError, match=rf"transformers>=5.20, and this is {version}"):
            check_transformers(version)
    needed = ".".join(map(str, OLDEST))
    project = Path(megatron_ttt.__file__).parent.parent / "pyproject.toml"
    assert f'"transformers>={needed}"' in project.read_text()


def test_an_export_names_the_version_before_it_needs_it(tmp_path: Path) -> None:
    """An older transformers has the files that the first one names, and runs nothing but it."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_ttt"}')
    write_auto_map(tmp_path)
    first = (tmp_path / "megatron_ttt_hf_configuration.py").read_text()
    for path in tmp_path.glob("megatron_ttt_*.py"):
        assert path.stem == "megatron_ttt_hf_configuration" or f"from .{path.stem} import" in first
    text = """
        import sys, types
        old = types.ModuleType("transformers")
        old.__version__ = "4.57.1"
        sys.modules["transformers"] = old
        sys.path.insert(0, "..")
        try:
            import {0}.megatron_ttt_hf_configuration
        except ImportError as error:
            print(error)
    """
    found = run_python(text.format(tmp_path.name), tmp_path)
    assert "need transformers>=5.20, and this is 4.57.1" in found


def test_auto_map_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="model_type 'qwen3' is none of qwen3_ttt, llama_ttt"):
        write_auto_map(tmp_path)
