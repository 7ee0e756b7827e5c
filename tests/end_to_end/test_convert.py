"""The program as a user runs it: import, start a run, export, compare; and each mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.lives import Run
from tests.unit.conversion.folders import QWEN3, write_hf
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# The published keys of a model with live fast weights; write_hf fills every tensor at random.
LIVE: dict[str, Any] = {
    **QWEN3,
    "tie_word_embeddings": True,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "ttt_mode": True,
    "ttt_layers": [1],
    "ttt_lr": 0.002,
    "ttt_chunk": 16,
}
RUN = [
    "model.layers=2",
    "model.hidden_size=24",
    "model.ffn_hidden_size=20",
    "model.heads=4",
    "model.kv_groups=2",
    "model.head_dim=10",
    "model.vocab_size=259",
    "model.max_positions=128",
    "model.rope.base=1e6",
    "model.sliding_window=null",
    "model.tied_embeddings=true",
    "ttt.layers=[1]",
    "ttt.eta=0.002",
    "ttt.chunk_size=16",
    "ttt.normalize=none",
    "ttt.target=hidden_states",
    "train.steps=2",
    "train.seq_length=64",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "optimizer.warmup_steps=0",
    "optimizer.lr=1e-5",
    "optimizer.min_lr=0",
    "validation.interval=null",
    "data.workers=0",
]


@dataclass
class Done:
    """What a finished command says: its exit status and both streams."""

    status: int
    stdout: str
    stderr: str


Convert = Callable[..., Done]


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    """Run ``tools/convert_checkpoint.py`` in this process."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        status = convert_checkpoint.main([str(word) for word in words])
        return Done(status, *capsys.readouterr())

    return run


def places(checkpoint: Path, output: Path) -> tuple[str, str]:
    return f"checkpoint={checkpoint}", f"output={output}"


def scaled(folder: Path) -> None:
    """Random weights of a size at which the model is not chaotic."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        scale, shift = (0.1, 1.0) if "norm" in name else (0.3, 0.0)
        tensors[name] = (scale * tensor.float() + shift).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_import_train_export(convert: Convert, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LIVE, dtype=torch.float32)
    scaled(tmp_path / "hf")
    imported = convert("import", *places(tmp_path / "hf", tmp_path / "megatron"), "verify=true")
    assert imported.status == 0, imported.stderr
    assert f"checkpoint.load={tmp_path / 'megatron'}" in imported.stdout

    losses = []
    for place in (f"hf:{tmp_path / 'hf'}", str(tmp_path / "megatron")):
        run = Run(tmp_path / f"run{len(losses)}", [*RUN, f"checkpoint.load={place}"])
        run.complete()
        rows = run.rows()
        losses.append([row["loss"] for row in rows])
        assert 0.01 < rows[-1]["ttt/update_ratio/layer_01"] < 0.5
    assert losses[0] == losses[1]

    for name, place in (("hf", f"hf:{tmp_path / 'hf'}"), ("own", str(tmp_path / "megatron"))):
        words = [*RUN, "model.rope.base=1e4", f"checkpoint.load={place}"]
        other = Run(tmp_path / f"other_{name}", words).start()
        assert other.wait() == 2, other.text
        (line,) = other.text.splitlines()
        assert line.startswith("model.rope.base=10000.0: the checkpoint has rope_theta=1000000.0")

    exported = convert("export", *places(tmp_path / "run0", tmp_path / "back"), "verify=true")
    assert exported.status == 0, exported.stderr
    stages = [line.split()[0] for line in exported.stdout.splitlines()]
    assert stages == ["compared", "embedding", "layer", "layer", "logits", "exported"]
    assert (tmp_path / "back" / "tokenizer.json").exists()  # found where the run began
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "qwen3_ttt" and "auto_map" in config
    changed = convert("diff", tmp_path / "hf", tmp_path / "back")
    assert changed.status == 1
    assert "model.layers.1.mlp.ttt_proj.weight: values" in changed.stdout


@pytest.mark.slow
def test_verification_names_the_first_layer_that_differs(tmp_path: Path) -> None:
    from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
    from megatron_ttt.config.schema import Config
    from megatron_ttt.conversion.failures import VerificationFailed
    from megatron_ttt.conversion.hf_folder import HFFolder
    from megatron_ttt.conversion.manifest import described_model
    from megatron_ttt.conversion.ttt_config import ttt_from_hf
    from megatron_ttt.conversion.verification import Comparison, compare_models, verify
    from megatron_ttt.training.distributed import distributed
    from tests.unit.conversion.folders import import_folder

    write_hf(tmp_path / "hf", QWEN3, dtype=torch.float32)
    scaled(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    path = tmp_path / "hf" / "model.safetensors"
    good = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    swapped = good[name].roll(1, dims=0)  # keys of other dims: shapes and norms do not tell
    folder = MegatronFolder(tmp_path / "megatron")
    model, ttt = described_model(folder)
    seen: list[str] = []

    def note(stage: Comparison) -> None:
        seen.append(stage.stage)

    live = {**QWEN3, "ttt_layers": [1], "ttt_lr": 0.01, "ttt_target": "input_embed"}
    write_hf(tmp_path / "reference", live, dtype=torch.float32)
    scaled(tmp_path / "reference")
    wanted = ttt_from_hf(live, layers=2, where="here")
    import_folder(tmp_path / "reference", tmp_path / "live", ttt=wanted)
    described = (
        MegatronFolder(tmp_path / "live"),
        *described_model(MegatronFolder(tmp_path / "live")),
    )

    with distributed(Config()) as ranks:
        # what the reference implementation would compute, from the published keys
        reference = compare_models(HFFolder(tmp_path / "reference"), *described, ranks.groups)
        verify(reference, lambda stage: None)
        changed = {**live, "ttt_lr": 0.02}
        (tmp_path / "reference" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(VerificationFailed, match="layer 1 is the first that differs"):
            reference = compare_models(HFFolder(tmp_path / "reference"), *described, ranks.groups)
            verify(reference, lambda stage: None)
        # what transformers reads counts, not what we read
        written = {**QWEN3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(written))
        with pytest.raises(VerificationFailed, match="layer 0 is the first that differs"):
            stages = compare_models(HFFolder(tmp_path / "hf"), folder, model, ttt, ranks.groups)
            verify(stages, lambda stage: None)
        (tmp_path / "hf" / "config.json").write_text(json.dumps(QWEN3))
        verify(compare_models(HFFolder(tmp_path / "hf"), folder, model, ttt, ranks.groups), note)
        assert seen == ["embedding", "layer 0", "layer 1", "logits"]
        save_file({**good, name: swapped}, path)
        with pytest.raises(VerificationFailed, match="layer 1 is the first that differs"):
            stages = compare_models(HFFolder(tmp_path / "hf"), folder, model, ttt, ranks.groups)
            verify(stages, note)


def test_mistakes_take_one_line_and_exit_2(convert: Convert, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    words = ["import", *places(tmp_path / "nothing", tmp_path / "megatron")]
    missing = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *words],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1), missing.stderr
    assert str(tmp_path / "nothing") in missing.stderr
    there = places(tmp_path / "hf", tmp_path / "megatron")
    differs = convert("import", *there, "model=qwen3_0_6b")
    assert differs.status == 2
    lines = differs.stderr.splitlines()
    assert any(line.startswith("model.layers=28: the checkpoint has") for line in lines)
    assert any("num_attention_heads=4" in line for line in lines)
    assert not list(tmp_path.glob("megatron*"))
    dry = convert("import", *there, "dry_run=true")
    assert dry.status == 0, dry.stderr
    assert "decoder.layers.0.mlp.ttt_proj.weight" in dry.stdout
    assert "initialised from the seed" in dry.stdout
    assert not list(tmp_path.glob("megatron*"))
