"""Megatron's indexed format, ``PREFIX.bin`` and ``PREFIX.idx``: writing, merging, describing.

    .bin   every document's token ids, one after the other, one fixed integer type
    .idx   magic "MMIDIDX\\0\\0" | version 1 (u64) | type code (u8) | sequences n (u64) |
           entries of the document list d (u64) | lengths [n] i32, tokens | pointers [n] i64, bytes
           into .bin | document list [d] i64, sequence numbers 0 ... n           (little endian)

Here a document is one sequence, so the document list counts 0 ... n. The files equal, byte for
byte, what ``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`` writes, but are
streamed: merging keeps no list of all documents, and preparing data does not import torch.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ttt.data.tokenizers import TokenizerIdentity
from megatron_ttt.files import replacing

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8 + 8
TYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
SIDECAR_VERSION = 1
_COPY_BYTES = 16 << 20
_INDEX_STRIDE = 1 << 20  # entries of the index handled at a time


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.meta.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of Megatron's own tools: uint16 while the vocabulary fits, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedWriter:
    """Streams documents into ``PREFIX.bin``; ``close`` writes ``PREFIX.idx`` and syncs both.

    Left by an exception, it closes the .bin and writes no .idx.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        self.prefix = Path(prefix)
        self.dtype = dtype
        self.lengths: list[int] = []
        self._stream = bin_path(prefix).open("wb")

    def add(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Append one document, ``tokens`` [length], as one sequence."""
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(len(tokens))

    def close(self) -> None:
        _sync_and_close(self._stream)
        _write_index(idx_path(self.prefix), self.dtype, [np.asarray(self.lengths, dtype=np.int32)])

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.close()


def merge_indexed(parts: Sequence[str | Path], prefix: str | Path, dtype: np.dtype[Any]) -> None:
    """Concatenate datasets written by :class:`IndexedWriter`, in order, into ``prefix``.

    Memory: one copy buffer and the lengths of one part at a time.
    """
    with bin_path(prefix).open("wb") as target:
        for part in parts:
            with bin_path(part).open("rb") as source:
                while block := source.read(_COPY_BYTES):
                    target.write(block)
        _sync(target)
    _write_index(idx_path(prefix), dtype, [_mapped_lengths(part) for part in parts])


def _mapped_lengths(prefix: str | Path) -> NDArray[np.int32]:
    """Return the lengths array of an index that this module wrote, mapped rather than read."""
    with idx_path(prefix).open("rb") as stream:
        header = stream.read(HEADER_BYTES)
    count = struct.unpack_from("<Q", header, len(MAGIC) + 9)[0]
    if count == 0:
        return np.empty(0, dtype=np.int32)
    return np.memmap(idx_path(prefix), np.int32, mode="r", offset=HEADER_BYTES, shape=(count,))


def _write_index(path: Path, dtype: np.dtype[Any], lengths: Sequence[NDArray[np.int32]]) -> None:
    """Write an .idx over the concatenation of ``lengths``, array after array."""
    code = next(code for code, known in TYPE_CODES.items() if known == dtype)
    count = sum(len(part) for part in lengths)
    with path.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<QBQQ", VERSION, code, count, count + 1))
        for part in lengths:
            stream.write(part.astype(np.int32).tobytes())
        start = 0
        for part in lengths:
            ends = start + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            stream.write(
                np.concatenate(([start], ends[:-1])).astype(np.int64)[: len(part)].tobytes()
            )
            start = int(ends[-1]) if len(part) else start
        for first in range(0, count + 1, _INDEX_STRIDE):
            last = min(first + _INDEX_STRIDE, count + 1)
            stream.write(np.arange(first, last, dtype=np.int64).tobytes())
        _sync(stream)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_and_close(stream: Any) -> None:
    _sync(stream)
    stream.close()


@dataclass(frozen=True)
class Sidecar:
    """``PREFIX.meta.json``: what the token ids mean and how many there are, without a scan.

    ``tokens`` counts everything in the .bin; ``pad_tokens`` of these only align documents to
    multiples of ``align`` (0: not aligned). ``text_bytes`` is the UTF-8 size of the documents.
    ``longest_source`` says where the longest document came from; ``skipped`` counts, by reason,
    what was left out. Equal inputs and options give equal bytes: it holds no dates.
    """

    tokenizer: TokenizerIdentity
    dtype: str
    documents: int
    tokens: int
    pad_tokens: int
    text_bytes: int
    max_token_id: int
    align: int
    longest_document_tokens: int
    longest_source: str
    skipped: dict[str, int]
    version: int = SIDECAR_VERSION

    def write(self, path: str | Path) -> None:
        write_json(Path(path), {**asdict(self), "tokenizer": self.tokenizer.as_dict()})

    @classmethod
    def read(cls, path: str | Path) -> "Sidecar":
        """Read a sidecar.

        Raises:
            ValueError: the file is not a sidecar of a version this program knows.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            version = fields["version"]
            if version != SIDECAR_VERSION:
                raise ValueError(f"version {version}, this program reads {SIDECAR_VERSION}")
            fields["tokenizer"] = TokenizerIdentity.from_dict(fields["tokenizer"])
            return cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise ValueError(f"{path} is not a dataset's sidecar: it has no key {error}") from error
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a dataset's sidecar: {error}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` so that ``path`` is either absent, the old content, or the new one, whole."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
