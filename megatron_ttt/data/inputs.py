"""Input files: which ones are meant, and what each of them holds.

The suffix proposes a format, in upper or lower case, and the content has to agree. A file that is
something else by its content, or may be, is refused by name, so that the user says ``format=``.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, BinaryIO

UTF8_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 64 << 10
_LINE_BYTES = 64 << 20  # of a first line that is read to see whether it is an object


class InputFormat(Enum):
    """``auto`` goes by the suffix and the content."""

    auto = "auto"
    text = "text"  # one document per file
    lines = "lines"  # one document per line
    jsonl = "jsonl"  # one JSON object per line
    parquet = "parquet"


SUFFIXES = {
    ".jsonl": InputFormat.jsonl,
    ".ndjson": InputFormat.jsonl,
    ".json": InputFormat.jsonl,
    ".parquet": InputFormat.parquet,
    ".txt": InputFormat.text,
}
_COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4", ".zip", ".br"}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_PARQUET = b"PAR1"
_ARRAY_OF_OBJECTS = re.compile(r'\[\s*\{\s*["}]')
_KEY = re.compile(r'\s*"(?:[^"\\]|\\.)*"\s*:')


@dataclass(frozen=True)
class InputFile:
    path: str
    format: InputFormat
    size: int  # bytes
    modified_ns: int


def list_inputs(
    paths: Sequence[str],
    *,
    format: InputFormat,
    pattern: str | None,
    option: str = "format=",
) -> list[InputFile]:
    """Return the files named, and those below the folders named, in that order, then by path.

    Args:
        pattern: glob of file names taken from folders; None: the suffixes of ``format``
            (``.txt`` for lines; all of ``SUFFIXES`` for ``auto``), in upper or lower case.
        option: how the user says a format, for messages.

    Raises:
        ValueError: a path does not exist or cannot be read, a folder holds no such file, a file
            comes twice under whatever names, or its content is not what its suffix or ``format``
            says.
    """
    found: list[Path] = []
    for name in paths:
        try:
            found.extend(_named(name, format, pattern))
        except OSError as error:
            raise ValueError(f"input {name} cannot be read: {error.strerror}") from error
    files: list[InputFile] = []
    seen: dict[tuple[int, int], Path] = {}
    for path in found:
        try:
            status = path.stat()
            before = seen.setdefault((status.st_dev, status.st_ino), path)
            if before is not path:
                also = "" if str(before) == str(path) else f": {before} is the same file"
                raise ValueError(f"input {path} is named twice{also}")
            kind = _format_of(path, format, option)
        except OSError as error:
            raise ValueError(f"input {path} cannot be read: {error.strerror}") from error
        files.append(InputFile(str(path), kind, status.st_size, status.st_mtime_ns))
    return files


def read_text(path: str | Path) -> str:
    """Read a whole file of text: UTF-8 without its byte order mark, line ends as they are.

    Raises:
        ValueError: it cannot be read, or is something else; one line that names the file.
    """
    path = Path(path)
    try:
        _format_of(path, InputFormat.text, "")
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return raw.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from error


def _named(name: str, format: InputFormat, pattern: str | None) -> list[Path]:
    path = Path(name)
    if not name:
        raise ValueError("an input's name is empty")
    if path.is_file():
        return [path]
    if not path.is_dir():
        kind = "is a pipe or a device, not a file" if path.exists() else "does not exist"
        raise ValueError(f"input {name} {kind}")
    suffixes = _suffixes(format)
    below = sorted(
        file
        for file in _files_below(path)
        if (PurePath(file).match(pattern) if pattern is not None else _has(file, suffixes))
    )
    if not below:
        wanted = pattern if pattern is not None else ", ".join(f"*{end}" for end in suffixes)
        raise ValueError(f"folder {name} holds no file named like {wanted}")
    return below


def _suffixes(format: InputFormat) -> list[str]:
    if format is InputFormat.auto:
        return list(SUFFIXES)
    plain = InputFormat.text if format is InputFormat.lines else format
    return [suffix for suffix, kind in SUFFIXES.items() if kind is plain]


def _has(file: Path, suffixes: Sequence[str]) -> bool:
    """Also a compressed file of such a name: it is refused later rather than left out unsaid."""
    name = file.name.lower()
    for suffix in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return PurePath(name).suffix in suffixes


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file, through links to folders too, each folder once."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (path for name in files if (path := Path(root, name)).is_file())


def _format_of(path: Path, format: InputFormat, option: str) -> InputFormat:
    """Return the format of a file whose content was looked at.

    Raises:
        ValueError: content and name, or content and ``format``, disagree.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        stream.seek(max(0, path.stat().st_size - len(_PARQUET)))
        is_parquet = head.startswith(_PARQUET) and stream.read() == _PARQUET
    chosen = format
    if format is InputFormat.auto:
        chosen = SUFFIXES.get(path.suffix.lower(), InputFormat.text)
    packed = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
    if packed is None and _BZIP2.match(head):
        packed = "bzip2"
    if packed is not None:
        raise ValueError(f"{path} is compressed ({packed}): decompress it first")
    if chosen is InputFormat.parquet:
        return chosen
    if is_parquet:
        raise ValueError(f"{path} is a Parquet file by its content{_say(option, 'parquet')}")
    encoding = next((kind for mark, kind in _MARKS.items() if head.startswith(mark)), None)
    if encoding is None and _alternates_with_nul(head):
        encoding = "UTF-16"
    if encoding is not None:
        raise ValueError(
            f"{path} is {encoding}, not UTF-8 (iconv -f {encoding} -t UTF-8 converts it)"
        )
    if chosen is not InputFormat.text and b"\r" in head.rstrip() and b"\n" not in head:
        raise ValueError(f"{path} ends its lines with CR alone (tr '\\r' '\\n' converts it)")
    if head.strip() and format in (InputFormat.auto, InputFormat.jsonl):
        _check_shape(path, _shape(path), chosen, format=format, option=option)
    return chosen


def _say(option: str, *formats: str) -> str:
    return f": give {option}{' or '.join(formats)}" if option else ""


def _alternates_with_nul(head: bytes) -> bool:
    """UTF-16 without its mark: Latin text has a zero as every other byte, and hardly any else."""
    sample = head[: 4096 & ~1]
    if len(sample) < 8:
        return False
    zeros = sorted((sample[0::2].count(0), sample[1::2].count(0)))
    return zeros[1] > 0.4 * len(sample) / 2 and zeros[0] < 0.05 * len(sample) / 2


class _Shape(Enum):
    """What a file's beginning is as JSON."""

    records = "one JSON object a line"
    array = "one JSON array, not an object a line"
    spread = "JSON over several lines, not an object a line"
    other = "something else"


def _check_shape(
    path: Path, shape: _Shape, chosen: InputFormat, *, format: InputFormat, option: str
) -> None:
    suffix = path.suffix.lower()
    if chosen is InputFormat.jsonl:
        if shape in (_Shape.array, _Shape.spread):
            command = "jq -c '.[]'" if shape is _Shape.array else "jq -c ."
            kept = f", {option}text keeps its source" if option else ""
            raise ValueError(f"{path} holds {shape.value}: {command} makes lines of it{kept}")
        if shape is _Shape.other and suffix == ".json" and format is InputFormat.auto:
            message = "does not begin with a JSON object on a line"
            raise ValueError(f"{path} {message}{_say(option, 'jsonl', 'lines', 'text')}")
    elif shape is _Shape.records:
        raise ValueError(f"{path} holds {shape.value}{_say(option, 'jsonl', 'text')}")
    elif shape is not _Shape.other and suffix in ("", ".txt"):
        raise ValueError(f"{path} holds {shape.value}{_say(option, 'text')} to keep its source")


def _shape(path: Path) -> _Shape:
    with path.open("rb") as stream:
        first = _next_line(stream)
        if first[:1] not in ("{", "["):
            return _Shape.other
        second = _next_line(stream)
        stream.seek(0)
        head = stream.read(_HEAD_BYTES).removeprefix(UTF8_MARK).decode("utf-8", "replace").lstrip()
    value = _parsed(first)
    if isinstance(value, dict):
        return _Shape.records if value else _Shape.other
    if isinstance(value, list):
        return _Shape.other if second else _Shape.array
    if first == "[" or _ARRAY_OF_OBJECTS.match(head):
        return _Shape.array
    try:
        _, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        end = 0  # damaged, or longer than the head
    if "\n" in head[:end] or (first[0] == "{" and _KEY.match(second)):
        return _Shape.spread if first[0] == "{" else _Shape.array
    return _Shape.other


def _next_line(stream: BinaryIO) -> str:
    """Return the next line that is not blank; empty at the end."""
    while raw := stream.readline(_LINE_BYTES):
        line = raw.removeprefix(UTF8_MARK).decode("utf-8", "replace").strip()
        if line:
            return line
    return ""


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
