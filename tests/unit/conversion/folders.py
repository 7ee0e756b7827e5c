"""Small Hugging Face folders, written without ``transformers``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.config.schema import ModelConfig, TTTConfig, TTTMode
from megatron_ttt.conversion.exporting import HFView, Style, export_checkpoint
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.importing import import_checkpoint
from megatron_ttt.conversion.manifest import described_model, origin
from megatron_ttt.conversion.mapping import build_mapping
from megatron_ttt.conversion.source import MegatronView
from megatron_ttt.conversion.ttt_config import target_generator, ttt_from_hf

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 103,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def silent(name: str, size: int) -> None:
    """No progress bar."""


def write_hf(
    folder: Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    files: int = 1,
) -> dict[str, Tensor]:
    """A random checkpoint for a ``config.json``; several files get an index.

    Returns:
        Its tensors.
    """
    folder.mkdir(parents=True)
    model = model_from_hf(config, name="m", where="m")
    ttt = ttt_from_hf(config, layers=model.layers, where="m")
    mapping = build_mapping(model, target_generator(ttt, layers=model.layers))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in mapping.hf_shapes().items()
    }
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in mapping.zeros.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weights = {name: f"model-{place % files}.safetensors" for place, name in enumerate(names)}
    for file in set(weights.values()):
        save_file({n: tensors[n] for n in names if weights[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return tensors


def import_folder(
    source: Path,
    destination: Path,
    *,
    ttt: TTTConfig | None = None,
    seed: int = 3,
    block_bytes: int = 500,
    window: int | None = None,
) -> ModelConfig:
    """Import with fast weights as given, or as the source has them; ``window``: for training."""
    hf = HFFolder(source)
    layers = hf.config["num_hidden_layers"]
    if ttt is None:
        ttt = ttt_from_hf(hf.config, layers=layers, where="m") or TTTConfig(mode=TTTMode.off)
    view = MegatronView(hf, target=target_generator(ttt, layers=layers), seed=seed)
    if window is not None:
        view.model = replace(view.model, sliding_window=window)
    import_checkpoint(view, destination, ttt=ttt, report=silent, block_bytes=block_bytes)
    return view.model


def export_folder(
    source: Path, destination: Path, *, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Export as the manifest describes it; the exported tensors."""
    folder = MegatronFolder(source)
    model, ttt = described_model(folder)
    options = {"style": Style.reference, "shard_bytes": 9000, "block_bytes": 700, **options}
    export_checkpoint(
        HFView(folder, model, ttt, dtype=dtype),
        destination,
        companions_from=origin(folder),
        report=silent,
        **options,
    )
    return read_hf(destination)


def read_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the library's own reader."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
