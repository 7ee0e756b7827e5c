"""What a file is: by its suffix in any case, by its content, or refused by name."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ttt.data.inputs import InputFormat, list_inputs, read_text

AUTO = InputFormat.auto
RECORDS = b'{"text": "a"}\n{"text": "b"}\n'
ARRAY = json.dumps([{"text": "a"}, {"text": "b"}])
SPREAD = json.dumps({"text": "a", "more": [1, {"b": 2}]}, indent=2)


def formats(*paths: Path, format: InputFormat = AUTO) -> list[InputFormat]:
    found = list_inputs([str(path) for path in paths], format=format, pattern=None)
    return [file.format for file in found]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("x.jsonl", RECORDS, InputFormat.jsonl),
        ("x.JSONL", RECORDS, InputFormat.jsonl),
        ("x.json", RECORDS, InputFormat.jsonl),
        ("x.Json", b"\xef\xbb\xbf\r\n" + RECORDS, InputFormat.jsonl),
        ("x.NDJSON", RECORDS, InputFormat.jsonl),
        ("x.json", '{"text": "only one"}', InputFormat.jsonl),
        ("x.json", json.dumps({"text": "long " * 50_000}) + "\n", InputFormat.jsonl),
        ("x.json", "", InputFormat.jsonl),
        ("x.jsonl", b'{"text": "cut\n' + RECORDS, InputFormat.jsonl),
        ("x.jsonl", b'["a"]\n' + RECORDS, InputFormat.jsonl),
        ("x.jsonl", b"{\n\n" + RECORDS, InputFormat.jsonl),
        ("x.txt", "[1] A citation, and [2] another.\nMore.", InputFormat.text),
        ("x.TXT", "[[link]] and {braces}\n", InputFormat.text),
        ("x.py", "{}\n", InputFormat.text),
        ("x.ipynb", SPREAD, InputFormat.text),
        ("x", "PAR1 is no table", InputFormat.text),
        ("x", "", InputFormat.text),
    ],
)
def test_the_format_of_a_file(
    tmp_path: Path, name: str, content: bytes | str, format: InputFormat
) -> None:
    assert formats(write(tmp_path / name, content)) == [format]


@pytest.mark.parametrize("format", [AUTO, InputFormat.jsonl])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ARRAY, r"one JSON array, not an object a line: jq -c '\.\[\]'"),
        (json.dumps(json.loads(ARRAY), indent=1), "one JSON array"),
        ("[\n" + ",\n".join(['{"text": "a"}'] * 9000) + "\n]", "one JSON array"),
        ('["a",\n"b"]', "one JSON array"),
        (SPREAD, r"JSON over several lines, not an object a line: jq -c \."),
        (SPREAD + "\n" + SPREAD, "JSON over several lines"),
        (json.dumps({"text": "a" * 99_999, "b": 1}, indent=4), "JSON over several lines"),
        ('{"a": [\n1,\n2]}\n', "JSON over several lines"),
    ],
)
def test_json_that_is_no_object_a_line(
    tmp_path: Path, name: str, content: str, said: str, format: InputFormat
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{name} holds {said}.*format=text"):
        formats(path, format=format)
    assert formats(path, format=InputFormat.text) == [InputFormat.text]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", RECORDS, "holds one JSON object a line: give format=jsonl or text"),
        ("x", '{"text": "one"}', "holds one JSON object a line: give format=jsonl or text"),
        ("x.log", RECORDS, "holds one JSON object a line: give format=jsonl or text"),
        ("x.txt", ARRAY, "holds one JSON array, .*: give format=text"),
        ("x.txt", SPREAD, "holds JSON over several lines, .*: give format=text"),
        ("x.json", "prose\n", "does not begin with a JSON object .* format=jsonl or lines or text"),
        ("x.json", "17\n", "does not begin with a JSON object"),
    ],
)
def test_doubt_asks_for_the_format(
    tmp_path: Path, name: str, content: bytes | str, said: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=said):
        formats(path)
    for format in (InputFormat.text, InputFormat.lines):
        assert formats(path, format=format) == [format]


@pytest.mark.parametrize("format", [AUTO, InputFormat.text, InputFormat.lines, InputFormat.jsonl])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(RECORDS), r"compressed \(gzip\): decompress it first"),
        (bz2.compress(RECORDS), r"compressed \(bzip2\)"),
        (lzma.compress(RECORDS), r"compressed \(xz\)"),
        (b"\x28\xb5\x2f\xfd\x04", r"compressed \(zstd\)"),
        ("text\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("text\n".encode("utf-16-le") * 9, "is UTF-16, not UTF-8"),
        ("text\n".encode("utf-16-be") * 9, "is UTF-16, not UTF-8"),
        ("text\n".encode("utf-32"), "is UTF-32, not UTF-8"),
    ],
)
def test_bytes_that_are_no_utf_8_text(
    tmp_path: Path, content: bytes, said: str, format: InputFormat
) -> None:
    for name in ("x.jsonl", "x.txt", "x.GZ"):
        with pytest.raises(ValueError, match=said):
            formats(write(tmp_path / name, content), format=format)


def test_a_table_by_another_name(tmp_path: Path) -> None:
    path = tmp_path / "x.PARQUET"
    pq.write_table(pa.table({"text": ["a"]}), path)
    assert formats(path) == [InputFormat.parquet]
    for name in ("x.txt", "x.jsonl", "x"):
        other = write(tmp_path / name, path.read_bytes())
        with pytest.raises(ValueError, match="Parquet file by its content: give format=parquet"):
            formats(other)
        assert formats(other, format=InputFormat.parquet) == [InputFormat.parquet]
        with pytest.raises(ValueError, match="Parquet file by its content"):
            formats(other, format=InputFormat.lines)


def test_lines_that_end_with_cr_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", RECORDS.replace(b"\n", b"\r"))
    for format in (AUTO, InputFormat.jsonl, InputFormat.lines):
        with pytest.raises(ValueError, match="ends its lines with CR alone"):
            formats(path, format=format)


def test_folders_are_searched_by_suffix_in_any_case(tmp_path: Path) -> None:
    for name in ("a.JSONL", "b.json", "c.ndjson", "d.Txt", "README.md"):
        write(tmp_path / name, "text" if name.endswith(("t", "d")) else RECORDS)
    named = list_inputs([str(tmp_path)], format=AUTO, pattern=None)
    assert [Path(file.path).name for file in named] == ["a.JSONL", "b.json", "c.ndjson", "d.Txt"]
    write(tmp_path / "e.JSONL.gz", gzip.compress(RECORDS))
    with pytest.raises(ValueError, match=r"e\.JSONL\.gz is compressed"):
        formats(tmp_path)


def test_folders_behind_links_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "real" / "x.jsonl", RECORDS)
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "real")
    found = list_inputs([str(tmp_path / "corpus")], format=AUTO, pattern=None)
    assert [file.path for file in found] == [str(tmp_path / "corpus" / "link" / "x.jsonl")]


@pytest.mark.parametrize("second", ["same", "dots", "symbolic", "hard", "folder"])
def test_a_file_comes_once_whatever_its_names(tmp_path: Path, second: str) -> None:
    path = write(tmp_path / "x.txt", "text")
    link = tmp_path / "y.txt"
    if second == "symbolic":
        link.symlink_to(path)
    elif second == "hard":
        os.link(path, link)
    names = {"same": path, "dots": tmp_path / ".." / tmp_path.name / "x.txt", "folder": tmp_path}
    with pytest.raises(ValueError, match="is named twice"):
        formats(path, names.get(second, link))


def test_names_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe or a device, not a file"):
        formats(tmp_path / "pipe")
    with pytest.raises(ValueError, match="name is empty"):
        list_inputs([""], format=AUTO, pattern=None)
    with pytest.raises(ValueError, match="cannot be read"):
        list_inputs(["x" * 300], format=AUTO, pattern=None)


def test_a_text_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", b"\xef\xbb\xbf{\r\n \x00 \xe2\x82\xac}\r")
    assert read_text(path) == "{\r\n \0 €}\r"
    with pytest.raises(ValueError, match="is UTF-16"):
        read_text(write(path, "text".encode("utf-16")))
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 1"):
        read_text(write(path, b"a\xff"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(tmp_path)
