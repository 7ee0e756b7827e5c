"""Runs the programs on a folder of stored files and collects what they compute.

Only command lines and the ``transformers`` classes are used, no function of the package, so that
the same code runs on the commit that wrote the files and on every later one.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "the river of red stone and the stone of the river"
# What train() is told; the first steps were taken when the files were written.
TRAIN = [
    "+model=tiny",
    "model.layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.heads=2",
    "model.kv_groups=1",
    "model.head_dim=8",
    "model.sliding_window=null",
    "model.max_positions=128",
    "model.tied_embeddings=true",
    "model.rope.base=1e6",
    "ttt.layers=[0,1]",
    "ttt.chunk_size=16",
    "ttt.target=hidden_states",
    "ttt.normalize=key_energy",
    "ttt.eta=0.04",
    "ttt.decay=0.9",
    "ttt.clip.mode=relative",
    "ttt.clip.bound=0.1",
    "data.source=files",
    "data.path=data/text",
    "data.split='100,0,0'",
    "data.workers=0",
    "train.seq_length=64",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "optimizer.lr=1e-3",
    "validation.interval=null",
    "checkpoint.interval=100",
]
STORED_STEPS, ALL_STEPS = 2, 4


def program(path: str, *words: str) -> str:
    """Run a program of the repository in this process; its standard output.

    Raises:
        AssertionError: its exit status is not 0; holds what it printed.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [path, *words]),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
    ):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert not status, f"{path} {' '.join(words)}: status {status}\n{err.getvalue()}"
    return out.getvalue()


def loss_of(checkpoint: str, scratch: Path) -> dict[str, float]:
    """Loss of the stored text, with fast weights and without (``tools/evaluate.py``)."""
    program(
        "tools/evaluate.py",
        "task=perplexity",
        f"checkpoint={checkpoint}",
        f"output={scratch}",
        "data.path=data/text",
        "data.split=all",
        "data.tokenizer=bytes",
        "perplexity.length=96",
        "perplexity.rows=4",
        "perplexity.bins=1",
        "perplexity.contexts=[96]",
        "perplexity.scored=16",
    )
    readings = json.loads((scratch / "perplexity.json").read_text())["readings"]
    return {name: reading["loss"] for name, reading in readings.items()}


def text_of(model: str, *words: str) -> str:
    """Text that a model goes on with (``tools/generate.py``)."""
    fixed = ("--tokenizer", "bytes", "--max-new-tokens", "12")
    return program("tools/generate.py", model, *fixed, *words)


@torch.no_grad()
def logits_of(model: str) -> list[list[float]]:
    """Some logits of the prompt through the ``transformers`` classes, one row a position."""
    from transformers import AutoModelForCausalLM

    import megatron_ttt.hf  # noqa: F401 (registers the classes)

    loaded: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([list(PROMPT.encode())])
    return loaded(ids).logits[0, ::8, 100:108].tolist()
