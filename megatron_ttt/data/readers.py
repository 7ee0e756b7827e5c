"""Input files cut into shards, and the documents of a shard, one at a time.

A byte order mark at a document's start is not part of it, wherever files were joined or converted.

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
from typing import Any, BinaryIO

from megatron_ttt.data.inputs import UTF8_MARK, InputFile, InputFormat

MIN_SHARD_BYTES = 1 << 20
MAX_SHARD_BYTES = 64 << 20
_PARQUET_ROWS = 256  # rows decoded at a time
# As pyarrow prints them, since its older versions lack some; null: a column without any text.
_TEXT_TYPES = {"string", "large_string", "string_view", "null"}


class Damage(Enum):
    """Why a document was left out."""

    bad_json = "bad_json"
    missing_field = "missing_field"  # no such key, or a null
    not_text = "not_text"  # the field is not a string
    undecodable = "undecodable"  # not UTF-8, or half a surrogate pair
    unreadable = "unreadable"  # a row group, from its damage on
    empty = "empty"  # no characters; counted, but no reason to stop


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


def cut_shards(
    files: Sequence[InputFile], *, column: str, shard_bytes: int | None = None
) -> list[list[Piece]]:
    """Shards of about ``shard_bytes``; None: a 64th of all, between 1 and 64 MiB.

    Raises:
        ValueError: a Parquet file is damaged, or has no text column ``column``.
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
            f"{file.path} is not a readable Parquet file: {_first_line(error)}"
        ) from error
    times = schema.names.count(column)
    if times == 0:
        raise ValueError(f"{file.path} has no column {column!r}, only: {', '.join(schema.names)}")
    if times > 1:
        raise ValueError(f"{file.path} has {times} columns named {column!r}: rename all but one")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in _TEXT_TYPES:
        raise ValueError(f"{file.path}: column {column!r} holds {kind}, not text")
    return sizes


def read_piece(file: InputFile, piece: Piece, *, json_key: str, column: str) -> Iterator[Document]:
    """Documents of one piece, in the file's order.

    Raises:
        OSError: the file cannot be read.
    """
    if file.format is InputFormat.parquet:
        yield from _read_row_groups(file.path, piece, column)
        return
    with open(file.path, "rb") as stream:
        if file.format is InputFormat.text:
            yield _document(1, _decode(stream.read()))
            return
        for place, line in enumerate(_lines(stream, piece), start=1):
            decoded = _decode(line.removeprefix(UTF8_MARK).rstrip(b"\r\n"))
            if file.format is InputFormat.jsonl and isinstance(decoded, str) and decoded.strip():
                decoded = _field(decoded, json_key)
            yield _document(place, decoded)


def read_documents(
    files: Sequence[InputFile], *, json_key: str, column: str
) -> Iterator[tuple[str, Document]]:
    """Documents of whole files, in order, each with its place as :func:`place_in` says it.

    Raises:
        ValueError: a Parquet file is damaged, or has no text column ``column``.
        OSError: a file cannot be read.
    """
    seen: Counter[int] = Counter()
    for piece in itertools.chain(*cut_shards(files, column=column)):
        file, before, place = files[piece.file], seen[piece.file], 0
        for document in read_piece(file, piece, json_key=json_key, column=column):
            place = document.place
            yield place_in(file, before + place), document
        seen[piece.file] += place


def place_in(file: InputFile, place: int) -> str:
    """``file:line`` or ``file:row``, counted from 1; the file alone where it is one document."""
    return file.path if file.format is InputFormat.text else f"{file.path}:{place}"


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
                for scalar in batch.column(batch.schema.get_field_index(column)):
                    place += 1
                    yield _document(place, _parquet_text(scalar))
    except (pyarrow.ArrowException, OSError):
        yield Document(place + 1, None, Damage.unreadable)


def _parquet_text(scalar: Any) -> str | Damage:
    if not scalar.is_valid:
        return Damage.missing_field
    try:
        text: str | None = scalar.as_py()
    except UnicodeDecodeError:
        return Damage.undecodable
    return Damage.missing_field if text is None else text  # a dictionary can hold a null


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
    text = text.removeprefix("\ufeff")
    if not text.strip():
        return Document(place, None, Damage.empty)
    return Document(place, text, None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
