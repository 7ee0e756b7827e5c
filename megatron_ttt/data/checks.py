"""Is ``PREFIX.bin/.idx`` whole, and do its token ids fit the model? Asked before anything opens it.

Megatron's reader maps the files and trusts them: a truncated one surfaces as an error of mmap,
struct or a destructor, or not at all until a far sample is read.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ttt.data.indexed import (
    HEADER_BYTES,
    MAGIC,
    TYPE_CODES,
    VERSION,
    Sidecar,
    bin_path,
    idx_path,
    sidecar_path,
)

_STRIDE = 1 << 20  # index entries checked at a time
_SCAN_TOKENS = 16 << 20  # tokens scanned at a time


class IndexedDatasetError(ValueError):
    """A .bin/.idx pair that is missing, damaged, or does not fit; the message is one line."""


@dataclass(frozen=True)
class DatasetFacts:
    """What a checked dataset holds. ``lengths_crc32`` and ``bin_bytes`` identify its layout."""

    prefix: str
    dtype: str
    documents: int
    tokens: int
    bin_bytes: int
    lengths_crc32: int
    sidecar: Sidecar | None

    @property
    def layout_key(self) -> str:
        """Equal for two datasets whose documents have the same lengths in the same order."""
        return f"{self.documents}-{self.tokens}-{self.bin_bytes}-{self.lengths_crc32:08x}"


def check_indexed_dataset(prefix: str | Path) -> DatasetFacts:
    """Read the whole index, in pieces, and compare it with the sizes of both files.

    Raises:
        IndexedDatasetError: a file is missing or truncated, the index has a foreign magic,
            version or type, its counts do not add up to its size, a length is negative, a pointer
            does not follow from the lengths before it, the document list is not increasing from 0
            to the number of sequences, the .bin has another size than the index describes, or the
            sidecar belongs to other files.
    """
    prefix = str(prefix)
    idx, data = idx_path(prefix), bin_path(prefix)
    for path in (idx, data):
        if not path.is_file():
            hint = ""
            if prefix.endswith((".bin", ".idx")):
                hint = f" (a prefix is the path without its suffix: {prefix[:-4]})"
            raise IndexedDatasetError(f"{path} does not exist{hint}")
        if not os.access(path, os.R_OK):
            raise IndexedDatasetError(f"{path} cannot be read: permission denied")
    code, sequences, entries = _read_header(idx)
    dtype = TYPE_CODES[code]
    expected = HEADER_BYTES + sequences * (4 + 8) + entries * 8
    actual = idx.stat().st_size
    if actual == expected + sequences and sequences > 0:
        raise IndexedDatasetError(f"{idx} is a multimodal index (it has a mode per sequence)")
    if actual != expected:
        raise IndexedDatasetError(
            f"{idx} has {actual} bytes where {sequences} sequences and {entries} document entries"
            f" take {expected}: truncated or damaged"
        )
    if sequences == 0:
        raise IndexedDatasetError(f"{idx} holds no documents")
    tokens, crc = _check_sequences(idx, sequences, dtype.itemsize)
    _check_document_list(idx, sequences, entries)
    bin_bytes = data.stat().st_size
    if bin_bytes != tokens * dtype.itemsize:
        raise IndexedDatasetError(
            f"{data} has {bin_bytes} bytes where {idx.name} describes {tokens} tokens of"
            f" {dtype.itemsize} bytes, {tokens * dtype.itemsize}: truncated or of another index"
        )
    sidecar = _matching_sidecar(prefix, sequences, tokens, str(dtype))
    return DatasetFacts(prefix, str(dtype), sequences, tokens, bin_bytes, crc, sidecar)


def sequence_lengths(facts: DatasetFacts) -> NDArray[np.int32]:
    """Lengths [documents] in tokens, mapped from the checked index."""
    return np.memmap(
        idx_path(facts.prefix), np.int32, "r", offset=HEADER_BYTES, shape=(facts.documents,)
    )


def scan_token_range(facts: DatasetFacts) -> tuple[int, int]:
    """Smallest and largest token id, by reading the .bin once in bounded pieces."""
    tokens = np.memmap(bin_path(facts.prefix), np.dtype(facts.dtype), "r", shape=(facts.tokens,))
    low, high = int(tokens[0]), int(tokens[0])
    for first in range(0, facts.tokens, _SCAN_TOKENS):
        piece = tokens[first : first + _SCAN_TOKENS]
        low, high = min(low, int(piece.min())), max(high, int(piece.max()))
    return low, high


def check_token_range(facts: DatasetFacts, low: int, high: int, *, vocab_size: int) -> None:
    """Check that ids lie in the vocabulary.

    Raises:
        IndexedDatasetError: an id below 0 or at least ``vocab_size``, naming both.
    """
    if low < 0:
        raise IndexedDatasetError(f"{bin_path(facts.prefix)} holds the negative token id {low}")
    if high >= vocab_size:
        raise IndexedDatasetError(
            f"{bin_path(facts.prefix)} holds the token id {high}, beyond the model's vocabulary"
            f" (model.vocab_size={vocab_size}, largest id {vocab_size - 1})"
        )


def _read_header(idx: Path) -> tuple[int, int, int]:
    """Type code, number of sequences and of document entries."""
    with idx.open("rb") as stream:
        header = stream.read(HEADER_BYTES)
    if header[: len(MAGIC)] != MAGIC:
        raise IndexedDatasetError(f"{idx} is no Megatron index: it starts with {header[:9]!r}")
    if len(header) < HEADER_BYTES:
        raise IndexedDatasetError(f"{idx} is truncated inside its header ({len(header)} bytes)")
    version, code, sequences, entries = struct.unpack_from("<QBQQ", header, len(MAGIC))
    if version != VERSION:
        raise IndexedDatasetError(f"{idx} has index version {version}, only {VERSION} is known")
    if code not in TYPE_CODES:
        raise IndexedDatasetError(f"{idx} has the token type code {code}, valid: {[*TYPE_CODES]}")
    return code, sequences, entries


def _check_sequences(idx: Path, sequences: int, itemsize: int) -> tuple[int, int]:
    """Lengths and pointers agree; returns the number of tokens and the lengths' CRC-32."""
    lengths = np.memmap(idx, np.int32, "r", offset=HEADER_BYTES, shape=(sequences,))
    offset = HEADER_BYTES + 4 * sequences
    pointers = np.memmap(idx, np.int64, "r", offset=offset, shape=(sequences,))
    tokens, crc = 0, 0
    for first in range(0, sequences, _STRIDE):
        piece = np.asarray(lengths[first : first + _STRIDE])
        if piece.min() < 0:
            at = first + int(piece.argmin())
            raise IndexedDatasetError(f"{idx} gives sequence {at} the length {piece.min()}")
        ends = tokens + np.cumsum(piece, dtype=np.int64)
        starts = (ends - piece) * itemsize
        wrong = np.flatnonzero(pointers[first : first + _STRIDE] != starts)
        if len(wrong):
            at = first + int(wrong[0])
            raise IndexedDatasetError(
                f"{idx} points sequence {at} to byte {int(pointers[at])} of the .bin, the lengths"
                f" before it end at {int(starts[wrong[0]])}: damaged"
            )
        tokens, crc = int(ends[-1]), zlib.crc32(piece.tobytes(), crc)
    if tokens == 0:
        raise IndexedDatasetError(f"{idx} holds {sequences} documents without a single token")
    return tokens, crc


def _check_document_list(idx: Path, sequences: int, entries: int) -> None:
    offset = HEADER_BYTES + (4 + 8) * sequences
    if entries < 2:
        raise IndexedDatasetError(f"{idx} has {entries} document entries, fewer than 2")
    listed = np.memmap(idx, np.int64, "r", offset=offset, shape=(entries,))
    if listed[0] != 0 or listed[-1] != sequences:
        raise IndexedDatasetError(
            f"{idx} lists documents from {listed[0]} to {listed[-1]}, not from 0 to {sequences}"
        )
    for first in range(0, entries - 1, _STRIDE):
        if np.any(np.diff(listed[first : first + _STRIDE + 1]) < 0):
            raise IndexedDatasetError(f"{idx} has a document list that is not increasing: damaged")


def _matching_sidecar(prefix: str, documents: int, tokens: int, dtype: str) -> Sidecar | None:
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        sidecar = Sidecar.read(path)
    except ValueError as error:
        raise IndexedDatasetError(str(error)) from error
    described = (sidecar.documents, sidecar.tokens, sidecar.dtype)
    if described != (documents, tokens, dtype):
        raise IndexedDatasetError(
            f"{path} describes {described[0]} documents, {described[1]} tokens of {described[2]};"
            f" the dataset beside it has {documents}, {tokens} of {dtype}: not its sidecar"
        )
    return sidecar
