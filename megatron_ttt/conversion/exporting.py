"""Megatron distributed checkpoint -> Hugging Face folder, one row block at a time."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_ttt.checkpoints.json_files import read_json
from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, MegatronFolder, row_blocks
from megatron_ttt.checkpoints.work_folder import WorkFolder, writing
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import ModelConfig, TTTConfig, TTTMode
from megatron_ttt.conversion.hf_config import (
    TTT_SUFFIX,
    check_agreement,
    hf_from_model,
    model_from_hf,
    without_fast_weights,
)
from megatron_ttt.conversion.hf_folder import CONFIG, INDEX, WEIGHTS, companions
from megatron_ttt.conversion.importing import Report
from megatron_ttt.conversion.mapping import Mapping, build_mapping
from megatron_ttt.conversion.rules import Run
from megatron_ttt.conversion.ttt_config import hf_from_ttt, target_generator
from megatron_ttt.rule import CONV, KERNEL_SIZE, Conv

SHARD_BYTES = 4 << 30
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Of a source's config.json: the other spelling of what we write, and what we decide.
_REPLACED = (
    "rope_parameters",
    "original_max_position_embeddings",
    "layer_types",
    "dtype",
    "torch_dtype",
    "auto_map",
)


class Style(Enum):
    """How a model with fast weights calls itself.

    ``package``: by the classes of ``megatron_ttt.hf``. ``reference``: by the plain architecture
    with ``ttt_*`` keys, as the published reference implementation does.
    """

    package = "package"
    reference = "reference"


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: from Megatron's rows, or a constant."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[tuple[str, Run], ...]  # empty for a constant
    constant: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class HFView:
    """Hugging Face's tensors, made of a Megatron checkpoint.

    Attributes:
        folder: the source.
        pieces: every tensor, in the order of the forward pass.
        fast: whether any layer has fast weights.
    """

    def __init__(
        self,
        folder: MegatronFolder,
        model: ModelConfig,
        ttt: TTTConfig,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check every name and shape.

        Args:
            folder: the source.
            model, ttt: its configuration.
            dtype: of all exported tensors; ``None``: as stored.

        Raises:
            ConfigError: a tensor is missing or of another shape.
        """
        self.folder, self.model, self.ttt = folder, model, ttt
        target = target_generator(ttt, layers=model.layers)
        self.fast = bool(target.layers)
        self.mapping: Mapping = build_mapping(model, target)
        self._check()
        places, shapes = self.mapping.megatron_runs(), self.mapping.hf_shapes()
        pieces = [
            Piece(name, shapes[name], dtype or folder.tensors[runs[0][0]].dtype, tuple(runs))
            for name, runs in places.items()
        ]
        common = dtype or folder.tensors["embedding.word_embeddings.weight"].dtype
        for name, shape in self.mapping.zeros.items():
            pieces.append(Piece(name, shape, common, (), torch.zeros(shape, dtype=common)))
        if target.layers and ttt.conv is Conv.off:
            kernel = torch.zeros(model.hidden_size, 1, KERNEL_SIZE, dtype=common)
            kernel[:, :, KERNEL_SIZE // 2] = 1  # no convolution is the identity
            for layer in target.layers:
                name = f"model.layers.{layer}.mlp.{CONV}"
                pieces.append(Piece(name, tuple(kernel.shape), common, (), kernel))
        self.pieces = pieces

    def blocks(self, piece: Piece, limit: int) -> Iterator[Tensor]:
        """Yield the tensor's rows in order, in its dtype."""
        if piece.constant is not None:
            yield piece.constant
        for key, run in piece.runs:
            stored = self.folder.tensors[key]
            for start, stop in row_blocks((run.count, *stored.shape[1:]), stored.dtype, limit):
                rows = self.folder.rows(key, run.start + start, run.start + stop)
                yield rows.to(piece.dtype).contiguous()

    def config(
        self, source: dict[str, Any] | None, style: Style, *, where: str = "config.json"
    ) -> dict[str, Any]:
        """``config.json``: what the source's says beyond the architecture, and our own.

        Args:
            source: content of a ``config.json``, if there is one.
            style: see :class:`Style`.
            where: of the source, named in errors.

        Raises:
            ConfigError: what the source says would change the function, or the reference
                implementation has no such update rule.
        """
        if style is Style.reference:
            _check_reference(self.ttt)
        config = {key: value for key, value in (source or {}).items() if key not in _REPLACED}
        config = {key: value for key, value in config.items() if not key.startswith("ttt_")}
        config |= hf_from_model(self.model)
        keys = hf_from_ttt(self.ttt, layers=self.model.layers)
        if keys and style is Style.package:
            config["model_type"] += TTT_SUFFIX
            config["architectures"] = [
                name.replace("ForCausalLM", "TTTForCausalLM") for name in config["architectures"]
            ]
        else:
            config = without_fast_weights(config)
        read = model_from_hf(config, name=self.model.name, where=where)
        check_agreement(replace(self.model, family=read.family), read, where)
        dtypes = [piece.dtype for piece in self.pieces]
        config["torch_dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
        return {**config, **keys}

    def _check(self) -> None:
        path, stored = self.folder.path, self.folder.tensors
        missing = [t.megatron for t in self.mapping.tensors if t.megatron not in stored]
        if missing:
            message = f"lacks {', '.join(missing[:4])} ({len(missing)} tensors)"
            raise ConfigError([Fault("checkpoint", path, message)])
        faults = []
        for tensor in self.mapping.tensors:
            shape = stored[tensor.megatron].shape
            rows = shape[0]
            if tensor.megatron in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows = min(rows, self.model.vocab_size)  # the rest pads the vocabulary
            if (rows, *shape[1:]) != tensor.shape:
                message = f"{tensor.megatron} is {list(shape)} instead of {list(tensor.shape)}"
                faults.append(Fault("checkpoint", path, message))
        if faults:
            raise ConfigError(faults)


def export_checkpoint(
    view: HFView,
    destination: Path,
    *,
    companions_from: Path | None,
    style: Style,
    report: Report,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
    before_publish: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder; a call that was killed is continued, shard by shard, by the next one.

    Args:
        view: the source as Hugging Face's tensors.
        destination: folder; must not exist. Visible only when complete.
        companions_from: folder whose tokenizer and generation files (and the keys of whose
            ``config.json`` that do not describe the architecture) are taken over.
        style: see :class:`Style`.
        report: called with (tensor, its bytes) after each.
        shard_bytes: largest file of weights.
        block_bytes: rows converted at a time.
        before_publish: called with the finished folder before it becomes visible.

    Raises:
        ConfigError: the source is damaged, or the destination cannot be written.
    """
    source = None
    if companions_from is not None and (companions_from / CONFIG).exists():
        source = read_json(companions_from / CONFIG)
    config = view.config(source, style, where=f"{companions_from}/{CONFIG}")
    shards = shards_of(view.pieces, shard_bytes)
    metadata = view.folder.path / ".metadata"
    job = {
        "source": [str(view.folder.path.resolve()), metadata.stat().st_mtime_ns],
        "config": config,
        "shards": {file: [piece.name for piece in pieces] for file, pieces in shards.items()},
        "dtypes": [str(piece.dtype) for piece in view.pieces],
    }
    with writing(destination):
        folder = WorkFolder(destination, job)
        for file, pieces in shards.items():
            if file not in folder.done:
                with (folder.path / file).open("wb") as stream:
                    blocks = partial(view.blocks, limit=block_bytes)
                    write_shard(stream, pieces, blocks, report)
                folder.finish(file)
            else:
                for piece in pieces:
                    report(piece.name, piece.bytes)
        if len(shards) > 1:
            folder.write_text(INDEX, weights_index(shards))
        folder.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
        if companions_from is not None:
            for file in companions(companions_from):
                folder.copy(companions_from / file, file)
        if before_publish is not None:
            before_publish(folder.path)
        folder.publish()


def _check_reference(ttt: TTTConfig) -> None:
    """Check that the reference implementation has everything that the rule uses.

    Raises:
        ConfigError: the update rule has parts that the reference implementation would leave out.
    """
    usual = TTTConfig()
    parts = {
        "ttt.normalize": (ttt.normalize, usual.normalize),
        "ttt.kernel_size": (ttt.kernel_size if ttt.conv.is_learned else KERNEL_SIZE, KERNEL_SIZE),
        # without a convolution the export has an identity kernel
        "ttt.conv": (usual.conv if ttt.conv is Conv.off else ttt.conv, usual.conv),
        "ttt.decay": (ttt.decay, usual.decay),
        "ttt.write.kind": (ttt.write.kind, usual.write.kind),
        "ttt.clip.mode": (ttt.clip.mode, usual.clip.mode),
    }
    message = "the reference implementation has none: style=package exports it"
    faults = [
        Fault(key, value, message)
        for key, (value, none) in parts.items()
        if ttt.mode is not TTTMode.off and value != none
    ]
    if faults:
        raise ConfigError(faults)


def shards_of(pieces: list[Piece], limit: int) -> dict[str, list[Piece]]:
    """Tensors in order, in as few files of at most ``limit`` bytes as that allows."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write_shard(
    stream: BinaryIO,
    pieces: list[Piece],
    blocks: Callable[[Piece], Iterator[Tensor]],
    report: Report,
) -> None:
    """Write the safetensors format: length of the header, header, the bytes of each tensor.

    Args:
        stream: an empty file.
        pieces: its tensors.
        blocks: gives a tensor's rows in order.
        report: called with (tensor, its bytes) after each.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        span = [offset, offset + piece.bytes]
        header[piece.name] = {
            "dtype": _CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8
    stream.write(len(text).to_bytes(8, "little") + text)
    for piece in pieces:
        for rows in blocks(piece):
            stream.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        report(piece.name, piece.bytes)


def weights_index(shards: dict[str, list[Piece]]) -> str:
    total = sum(piece.bytes for pieces in shards.values() for piece in pieces)
    weights = {piece.name: file for file, pieces in shards.items() for piece in pieces}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(index, indent=2) + "\n"
