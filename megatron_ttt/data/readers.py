"""Input files cut into shards, and the documents of a shard, one at a time.

A *piece* is what one worker can read of one file without reading the rest: a whole text file, a
byte range of a file of lines, a row group of a Parquet file. A *shard* is a run of pieces worth
about the same number of bytes. Both follow from the inputs alone, never from the number of workers.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

MIN_SHARD_BYTES = 1 << 20
MAX_SHARD_BYTES = 64 << 20
_PARQUET_ROWS = 256  # rows decoded at a time


class InputFormat(Enum):
    """``auto`` goes by the suffix: .jsonl, .ndjson and .parquet are what they say, others text."""

    auto = "auto"
    text = "text"  # one document per file
    lines = "lines"  # one document per line
    jsonl = "jsonl"  # one JSON object per line
    parquet = "parquet"


class Damage(Enum):
    """Why a document was left out."""

    bad_json = "bad_json"
    missing_field = "missing_field"  # no such key, or a null
    not_text = "not_text"  # the field is no string
    undecodable = "undecodable"  # not UTF-8, or half a surrogate pair
    unreadable = "unreadable"  # a row group, from its damage on
    empty = "empty"  # no characters; counted, but no reason to stop


@dataclass(frozen=True)
class InputFile:
    path: str
    format: InputFormat
    size: int  # bytes
    modified_ns: int


@dataclass(frozen=True)
class Piece:
    """``start``..``stop``: bytes of a text or line file, row groups of a Parquet file."""

    file: int  # index into the list of inputs
    start: int
    stop: int
    size: int  # bytes it stands for, in progress and in balancing


@dataclass(frozen=True)
class Document:
    """A text, or why there is none. ``place`` counts lines or rows of the piece from 1."""

    place: int
    text: str | None
    damage: Damage | None


def list_inputs(
    paths: Sequence[str], *, format: InputFormat, pattern: str | None
) -> list[InputFile]:
    """The files named, and those below the folders named, in the order named and then by path.

    :param pattern: glob of file names taken from folders; None: ``*.txt``, ``*.jsonl`` or
        ``*.parquet``, by ``format`` (all three for ``auto``).
    :raises ValueError: a path does not exist, a folder holds no such file, or a file comes twice.
    """
    by_format = {
        InputFormat.text: ["*.txt"],
        InputFormat.lines: ["*.txt"],
        InputFormat.jsonl: ["*.jsonl"],
        InputFormat.parquet: ["*.parquet"],
        InputFormat.auto: ["*.txt", "*.jsonl", "*.parquet"],
    }
    globs = [pattern] if pattern is not None else by_format[format]
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            below = sorted({f for glob in globs for f in path.rglob(glob) if f.is_file()})
            if not below:
                raise ValueError(f"folder {name} holds no file named like {', '.join(globs)}")
            found.extend(below)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"input {name} does not exist")
    repeated = [str(path) for path, times in Counter(found).items() if times > 1]
    if repeated:
        raise ValueError(f"input {repeated[0]} is named twice")
    return [_describe(path, format) for path in found]


def _describe(path: Path, format: InputFormat) -> InputFile:
    if format is InputFormat.auto:
        by_suffix = {
            ".jsonl": InputFormat.jsonl,
            ".ndjson": InputFormat.jsonl,
            ".parquet": InputFormat.parquet,
        }
        format = by_suffix.get(path.suffix, InputFormat.text)
    status = path.stat()
    return InputFile(str(path), format, status.st_size, status.st_mtime_ns)


def cut_shards(
    files: Sequence[InputFile], *, column: str, shard_bytes: int | None = None
) -> list[list[Piece]]:
    """Shards of about ``shard_bytes``; None: a 64th of all, between 1 and 64 MiB.

    :raises ValueError: a Parquet file is damaged, or has no text column ``column``.
    """
    row_groups = {
        i: _row_groups(file, column)
        for i, file in enumerate(files)
        if file.format is InputFormat.parquet
    }
    if shard_bytes is None:
        total = sum(file.size for file in files)
        shard_bytes = min(max(total // 64, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    shards: list[list[Piece]] = []
    room = 0
    for i, file in enumerate(files):
        if file.format is InputFormat.parquet:
            pieces = [Piece(i, g, g + 1, size) for g, size in enumerate(row_groups[i])]
        elif file.format is InputFormat.text:
            pieces = [Piece(i, 0, file.size, file.size)]
        else:
            cuts = [*range(0, file.size, shard_bytes), file.size]
            pieces = [Piece(i, a, b, b - a) for a, b in itertools.pairwise(cuts)]
        for piece in pieces:
            if not shards or piece.size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(piece)
            room -= piece.size
    return shards


def _row_groups(file: InputFile, column: str) -> list[int]:
    """Bytes of every row group, after checking that the file is Parquet with a text ``column``."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as reader:
            schema, metadata = reader.schema_arrow, reader.metadata
            sizes = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file.path} is no readable Parquet file: {_first_line(error)}"
        ) from error
    if column not in schema.names:
        raise ValueError(f"{file.path} has no column {column!r}, only: {', '.join(schema.names)}")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{file.path}: column {column!r} holds {kind}, not text")
    return sizes


def read_piece(file: InputFile, piece: Piece, *, json_key: str, column: str) -> Iterator[Document]:
    """Documents of one piece, in the file's order.

    :raises OSError: the file cannot be read.
    """
    if file.format is InputFormat.parquet:
        yield from _read_row_groups(file.path, piece, column)
        return
    with open(file.path, "rb") as stream:
        if file.format is InputFormat.text:
            yield _document(1, _decode(stream.read()))
            return
        for place, line in enumerate(_lines(stream, piece), start=1):
            decoded = _decode(line.rstrip(b"\r\n"))
            if file.format is InputFormat.jsonl and isinstance(decoded, str) and decoded.strip():
                decoded = _field(decoded, json_key)
            yield _document(place, decoded)


def _lines(stream: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """Lines that *start* inside the range; the last may end beyond it."""
    if piece.start > 0:
        stream.seek(piece.start - 1)
        stream.readline()  # the rest of the line before, or just its end
    while stream.tell() < piece.stop:
        line = stream.readline()
        if not line:
            return
        yield line


def _read_row_groups(path: str, piece: Piece, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    place = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as reader:
            batches = reader.iter_batches(
                batch_size=_PARQUET_ROWS,
                row_groups=list(range(piece.start, piece.stop)),
                columns=[column],
                use_threads=False,
            )
            for batch in batches:
                for scalar in batch.column(0):
                    place += 1
                    yield _document(place, _parquet_text(scalar))
    except (pyarrow.ArrowException, OSError):
        yield Document(place + 1, None, Damage.unreadable)


def _parquet_text(scalar: Any) -> str | Damage:
    if not scalar.is_valid:
        return Damage.missing_field
    try:
        text: str = scalar.as_py()
    except UnicodeDecodeError:
        return Damage.undecodable
    return text


def _decode(raw: bytes) -> str | Damage:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return Damage.undecodable


def _field(line: str, key: str) -> str | Damage:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Damage.bad_json
    if not isinstance(record, dict) or record.get(key) is None:
        return Damage.missing_field
    text = record[key]
    if not isinstance(text, str):
        return Damage.not_text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return Damage.undecodable
    return text


def _document(place: int, text: str | Damage) -> Document:
    if isinstance(text, Damage):
        return Document(place, None, text)
    if not text.strip():
        return Document(place, None, Damage.empty)
    return Document(place, text, None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
