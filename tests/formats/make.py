"""Writes the stored files of ``tests/formats/files`` and what they compute.

The files hold the formats of commit 05ece55, and only that commit can write them again:

    git worktree add /tmp/formats 05ece55 && cp -r tests/formats /tmp/formats/tests/
    cd /tmp/formats && OMP_NUM_THREADS=1 python -m tests.formats.make all /tmp/files

Under another line of megatron-core, ``python -m tests.formats.make checkpoints /tmp/files`` then
adds the checkpoints of that line.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.formats.reading import (
    ALL_STEPS,
    PROMPT,
    ROOT,
    STORED_STEPS,
    TRAIN,
    logits_of,
    loss_of,
    program,
    text_of,
)
from tests.unit.conversion.folders import write_hf

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 258,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "ttt_mode": True,
    "ttt_layers": [0, 1],
    "ttt_chunk": 16,
    "ttt_lr": 0.01,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": False, "rope_scaling": LLAMA3, "ttt_target": "input_embed"},
    "qwen2": {"attention_bias": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 32},
}


def write_published(family: str, folder: Path) -> None:
    """A checkpoint as the published implementation writes it, with live fast weights."""
    write_hf(folder, {"model_type": family, **SIZES, **FAMILIES[family]}, dtype=torch.float32)
    (folder / "tokenizer.json").unlink()
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        scale, shift = (0.1, 1.0) if "norm" in name else (0.3, 0.0)
        tensors[name] = scale * tensor + shift
        if tensor.shape[0] == SIZES["vocab_size"]:  # what is generated shall be printable
            tensors[name][:32] *= 0.2
            tensors[name][127:] *= 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_text(folder: Path) -> None:
    """Documents of a few words, most of them longer than a row."""
    folder.mkdir()
    draw = random.Random(3)
    for number, size in enumerate((180, 130, 40, 150, 260)):
        words = [draw.choice(("red", "stone", "river", "of", "and", "the")) for _ in range(size)]
        (folder / f"{number}.txt").write_text(" ".join(words)[:size])


def train(*words: str) -> None:
    """``launch/pretrain.py`` as a user starts it."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), *TRAIN, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)


def write_checkpoints(name: str) -> None:
    """An imported checkpoint and a training run of this line of megatron-core."""
    folder = f"checkpoints/{name}"
    program("tools/convert_checkpoint.py", "import", "published/qwen3", f"{folder}/imported")
    train(
        f"run.dir={folder}/run",
        f"checkpoint.load={folder}/imported",
        f"train.steps={STORED_STEPS}",
    )


def write_exports(run: str) -> None:
    """One folder of each family and style."""
    program("tools/convert_checkpoint.py", "export", run, "exported/qwen3_package")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            source = f"{scratch}/imported"
            program("tools/convert_checkpoint.py", "import", f"published/{family}", source)
            if family == "llama":
                shutil.copytree(source, "checkpoints/llama")
                program("tools/convert_checkpoint.py", "export", source, "exported/llama_package")
            program(
                *("tools/convert_checkpoint.py", "export", source, f"exported/{family}_reference"),
                *("--style", "reference"),
            )
    for code in Path("exported").glob("*/*.py"):
        code.unlink()  # a copy of the package, for where it is not installed


def expected(run: str) -> dict[str, Any]:
    """What the files compute."""
    found: dict[str, Any] = {"loss": {}, "text": {}, "logits": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = [f"hf:{path}" for path in sorted(Path().glob("exported/*"))]
        names += [str(path) for path in sorted(Path().glob("checkpoints/*/imported"))]
        names += ["checkpoints/llama", run]
        for name in names:
            found["loss"][name] = loss_of(name, folder)
        Path("results").mkdir()
        shutil.copy(folder / "perplexity.json", "results/perplexity.json")
        again = f"{scratch}/run"
        shutil.copytree(Path(run).parents[1], again)
        train(f"run.dir={again}", f"train.steps={ALL_STEPS}")
        lines = Path(f"{again}/metrics.jsonl").read_text().splitlines()
    kept = ("step", "loss", "grad_norm", "consumed_tokens")
    found["steps"] = [
        {key: row[key] for key in row if key in kept or key.startswith("ttt/update_ratio")}
        for row in map(json.loads, lines)
    ]
    for package in ("exported/qwen3_package", "exported/llama_package"):
        found["logits"][package] = logits_of(package)
    for model in ("exported/qwen3_package", "exported/qwen3_reference", run):
        found["text"][model] = text_of(model, "--prompt", PROMPT)
    return found


def write_states(run: str) -> dict[str, str]:
    """A session and a memory of an export and of a training checkpoint; what they go on with."""
    found = {}
    Path("states").mkdir()
    for name, model in (("exported", "exported/qwen3_package"), ("trained", run)):
        session, memory = f"states/{name}.session", f"states/{name}.memory"
        text_of(model, "--prompt", PROMPT, "--session", session)
        text_of(model, "--prompt", PROMPT, "--save-memory", memory)
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copy(session, scratch)
            found[session] = text_of(model, "--prompt", " and then", "--session", copy)
        found[memory] = text_of(model, "--prompt", "of", "--memory", memory)
    return found


def main(words: list[str]) -> None:
    import megatron.core

    line = f"megatron_core_{'_'.join(megatron.core.__version__.split('.')[:2])}"
    Path(words[-1]).mkdir(exist_ok=True)
    os.chdir(words[-1])
    run = f"checkpoints/{line}/run/checkpoints/step_{STORED_STEPS:08d}"
    if words[0] == "all":
        for family in FAMILIES:
            write_published(family, Path("published") / family)
        write_text(Path("text"))
        program("tools/preprocess_data.py", "text", "--output", "data/text", "--align", "16")
        write_checkpoints(line)
        write_exports(run)
        states = write_states(run)
        computed = {**expected(run), "states": states}
        for folder in ("text", "published", "outputs"):
            shutil.rmtree(folder)
        Path("expected.json").write_text(json.dumps(computed, indent=1) + "\n")
    else:
        write_published("qwen3", Path("published/qwen3"))
        write_checkpoints(line)
        for folder in ("published", "outputs"):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
