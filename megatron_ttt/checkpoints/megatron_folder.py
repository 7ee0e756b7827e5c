"""Megatron's distributed checkpoints (``torch_dist``), written and read by rows, without Megatron.

The format is torch's own distributed checkpoint (``.metadata`` and files of ``torch.save``
records) with two small files of Megatron's beside it. Large tensors are stored as several row
blocks, so that neither side ever holds more than one block, and a rank that loads its slice reads
little more than that.
"""

import io
import json
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ttt.checkpoints.json_files import damaged, read_json
from megatron_ttt.checkpoints.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    parse_manifest,
)
from megatron_ttt.checkpoints.progress import BEGINNING
from megatron_ttt.checkpoints.run_files import LATEST
from megatron_ttt.checkpoints.tensor_only import tensor_only
from megatron_ttt.checkpoints.work_folder import WorkFolder
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.files import FileRecord

BLOCK_BYTES = 64 << 20
METADATA = ".metadata"
FORMAT = "metadata.json"
COMMON = "common.pt"


def row_blocks(shape: Sequence[int], dtype: torch.dtype, limit: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most ``limit`` bytes (at least one row) that tile a tensor."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, limit // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


class CheckpointWriter:
    """Writes one tensor after another into a partial folder, each into a file of its own."""

    def __init__(self, folder: WorkFolder) -> None:
        self.folder = folder
        self.tensors: dict[str, Any] = {}
        self.results: list[WriteResult] = []

    def add(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        blocks: Iterator[tuple[int, Tensor]],
    ) -> bool:
        """Write a tensor, unless a killed run already did.

        Args:
            name: its key.
            shape, dtype: of the whole tensor.
            blocks: ``(first row, rows)`` in ascending order; consumed only if there is work to do.

        Returns:
            Whether it was written now.
        """
        file = f"__{len(self.tensors)}_0.distcp"
        fresh = file not in self.folder.done
        if fresh:
            places = []
            with (self.folder.path / file).open("wb") as stream:
                for first, rows in blocks:
                    record = io.BytesIO()  # a full disk then shows as such, not as torch's error
                    torch.save(rows, record)
                    places.append([first, len(rows), stream.tell(), record.tell()])
                    stream.write(record.getbuffer())
            self.folder.finish(file, blocks=places)
        chunks = []
        for first, rows_, offset, length in self.folder.done[file]["blocks"]:
            start = torch.Size((first, *(0 for _ in shape[1:])))
            chunks.append(ChunkStorageMetadata(start, torch.Size((rows_, *shape[1:]))))
            index = MetadataIndex(name, start, len(chunks) - 1)
            info = _StorageInfo(file, offset, length)
            self.results.append(WriteResult(index, length, info))
        properties = TensorProperties(dtype=dtype)
        self.tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        return fresh

    def complete(self, *, content: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write what belongs to the checkpoint as a whole.

        Args:
            content: Megatron's ``content_metadata``: how the weights were laid out.
            facts: for ``manifest.json``.
        """
        writer = FileSystemWriter(self.folder.path)
        writer.finish(Metadata(self.tensors), [self.results])
        self.folder.finish(METADATA)
        torch.save({"content_metadata": content}, self.folder.path / COMMON)
        self.folder.finish(COMMON)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        self.folder.write_text(FORMAT, json.dumps(backends))
        files = {
            name: FileRecord(entry["bytes"], entry["sha256"])
            for name, entry in sorted(self.folder.done.items())
        }
        self.folder.write_text(MANIFEST, Manifest(BEGINNING, facts, files).text())


@dataclass(frozen=True)
class Block:
    """A stored part of a tensor: its place in the tensor and in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a distributed checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]


class MegatronFolder:
    """A distributed checkpoint, of ours or as training saved it, at whatever layout.

    Attributes:
        path: the folder.
        tensors: the model's tensors by key; optimizer state is left out.
        facts: from ``manifest.json``; empty without one.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata only.

        Args:
            path: the folder, or the file ``latest`` of a run.

        Raises:
            ConfigError: this is not a distributed checkpoint, or it is damaged.
        """
        if path.name == LATEST and path.is_file():
            path = path.parent / path.read_text().strip()
        self.path = path
        if not path.is_dir():
            raise ConfigError([Fault("checkpoint", path, "is not a folder")])
        backend = read_json(path / FORMAT).get("sharded_backend")
        if backend != "torch_dist":
            raise ConfigError([Fault("checkpoint", path, f"is of the format {backend}")])
        self.facts: dict[str, Any] = {}
        self._unchecked: dict[str, FileRecord] = {}  # of files that nobody has read yet
        if (path / MANIFEST).exists():
            try:
                manifest = parse_manifest(path)
            except DamagedCheckpoint as error:
                raise ConfigError([Fault("checkpoint", path, str(error))]) from error
            self.facts, self._unchecked = manifest.facts, dict(manifest.files)
        self.tensors = self._read_metadata()
        self._cached: tuple[Block, Tensor] | None = None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor, put together from whatever blocks hold them.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        tensor = self.tensors[name]
        result: Tensor | None = None
        for block in tensor.blocks:
            low = max(start, block.offsets[0])
            high = min(stop, block.offsets[0] + block.sizes[0])
            if low >= high:
                continue
            part = self._block(block)[low - block.offsets[0] : high - block.offsets[0]]
            if part.shape == (stop - start, *tensor.shape[1:]):
                return part
            if result is None:
                result = part.new_empty((stop - start, *tensor.shape[1:]))
            place = [slice(low - start, high - start)]
            place += [
                slice(offset, offset + size)
                for offset, size in zip(block.offsets[1:], block.sizes[1:], strict=True)
            ]
            result[tuple(place)] = part
        assert result is not None, f"rows {start} to {stop} of {name} {tensor.shape}"
        return result

    def _block(self, block: Block) -> Tensor:
        if self._cached is not None and self._cached[0] is block:
            return self._cached[1]
        self._cached = None  # before the next is read: never two at once
        path = self.path / block.file
        try:
            self._check(block.file)
            with path.open("rb") as file:
                loaded = torch.load(
                    FileSlice(file, block.position, block.length),  # type: ignore[arg-type]
                    map_location="cpu",
                    weights_only=True,
                )
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise damaged(path, _first_line(error)) from error
        if not isinstance(loaded, Tensor) or tuple(loaded.shape) != block.sizes:
            raise damaged(path, ValueError(f"expected a tensor {block.sizes}"))
        self._cached = (block, loaded)
        return loaded

    def _check(self, file: str) -> None:
        """Compare a file with its checksum, when it is first read."""
        expected = self._unchecked.pop(file, None)
        if expected is not None and FileRecord.of(self.path / file) != expected:
            raise ValueError("it does not match its checksum")

    def _read_metadata(self) -> dict[str, SavedTensor]:
        path = self.path / METADATA
        try:
            with tensor_only():
                metadata = FileSystemReader(self.path).read_metadata()
            stored, places = metadata.state_dict_metadata, metadata.storage_data
            assert places is not None, "no storage data"
        except FileNotFoundError:
            message = f"{METADATA} is missing"
            raise ConfigError([Fault("checkpoint", self.path, message)]) from None
        except Exception as error:  # pickle raises nearly anything on damaged bytes
            raise damaged(path, _first_line(error)) from error
        tensors = {}
        for name, entry in stored.items():
            if name.startswith("optimizer.") or not isinstance(entry, TensorStorageMetadata):
                continue
            blocks = []
            for chunk in entry.chunks:
                info = places[MetadataIndex(name, chunk.offsets)]
                where = (info.relative_path, info.offset, info.length)
                blocks.append(Block(tuple(chunk.offsets), tuple(chunk.sizes), *where))
            shape = tuple(entry.size)
            tensors[name] = SavedTensor(shape, entry.properties.dtype, tuple(blocks))
        missing = sorted(
            {
                block.file
                for tensor in tensors.values()
                for block in tensor.blocks
                if not (self.path / block.file).is_file()
            }
        )
        if missing:
            message = f"files are missing: {', '.join(missing)}"
            raise ConfigError([Fault("checkpoint", self.path, message)])
        return tensors


class FileSlice(io.RawIOBase):
    """Bytes ``[position, position + length)`` of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, position: int, length: int) -> None:
        self.file, self.position, self.length = file, position, length
        self.place = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Place within the slice."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file, within the slice."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        self.place = base + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the slice goes."""
        view = memoryview(buffer)[: max(0, self.length - self.place)]
        self.file.seek(self.position + self.place)
        count = self.file.readinto(view)
        self.place += count
        return count


def _first_line(error: Exception) -> Exception:
    text = str(error).strip().splitlines()
    return ValueError(text[0] if text else type(error).__name__)
