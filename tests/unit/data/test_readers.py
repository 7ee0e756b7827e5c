"""Inputs: which files, how they are cut, and that no cut loses or repeats a line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ttt.data.inputs import InputFormat, list_inputs
from megatron_ttt.data.readers import Damage, cut_shards, read_piece


def read_all(
    path: Path, format: InputFormat, *, shard_bytes: int, column: str = "text"
) -> tuple[list[str | None], list[Damage | None], int]:
    files = list_inputs([str(path)], format=format, pattern=None)
    shards = cut_shards(files, column=column, shard_bytes=shard_bytes)
    documents = [
        document
        for pieces in shards
        for piece in pieces
        for document in read_piece(files[piece.file], piece, json_key="text", column=column)
    ]
    return [d.text for d in documents], [d.damage for d in documents], len(shards)


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("shard_bytes", [1, 2, 3, 7, 8, 9, 1000])
def test_every_cut_gives_the_same_lines(tmp_path: Path, shard_bytes: int, end: str) -> None:
    lines = ["a", "bcdefghijkl", "é", "世界", "m\tn", "op"]
    path = tmp_path / "x.txt"
    path.write_bytes(("\n".join(lines) + end).encode())
    texts, _, shards = read_all(path, InputFormat.lines, shard_bytes=shard_bytes)
    assert texts == lines
    assert shards == -(-path.stat().st_size // shard_bytes)


def test_lines_keep_all_but_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"  a \r\n\r\n\xff\nb")
    texts, damages, _ = read_all(path, InputFormat.lines, shard_bytes=100)
    assert texts == ["  a ", None, None, "b"]
    assert damages == [None, Damage.empty, Damage.undecodable, None]


def test_every_damage_of_a_jsonl_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"other": "x"}',
        b'{"text": null}',
        b'["text"]',
        b'{"text": 3}',
        b'{"text": " "}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"",
        b'{"text": "a\\nb", "more": {}}',
    ]
    path.write_bytes(b"\n".join(lines))
    texts, damages, _ = read_all(path, InputFormat.jsonl, shard_bytes=30)
    assert texts == ["good", *[None] * 9, "a\nb"]
    assert damages == [
        None,
        Damage.bad_json,
        Damage.missing_field,
        Damage.missing_field,
        Damage.missing_field,
        Damage.not_text,
        Damage.empty,
        Damage.undecodable,
        Damage.undecodable,
        Damage.empty,
        None,
    ]


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"document {i}" for i in range(600)]
    pq.write_table(pa.table({"id": range(600), "body": texts}), path, row_group_size=256)
    found, _, shards = read_all(path, InputFormat.parquet, shard_bytes=1, column="body")
    assert (found, shards) == (texts, 3)
    nulls = pa.table({"body": pa.array(["a", None, ""], type=pa.large_string())})
    pq.write_table(nulls, path)
    found, damages, _ = read_all(path, InputFormat.parquet, shard_bytes=1, column="body")
    assert (found, damages) == (
        ["a", None, None],
        [None, Damage.missing_field, Damage.empty],
    )


def test_a_damaged_row_group_is_lost_whole_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"{i:04} {'abcdefgh' * (i % 7)}" for i in range(600)]
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=200,
        use_dictionary=False,
        compression="gzip",
    )
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 60] = bytes(60)
    path.write_bytes(bytes(content))
    found, damages, _ = read_all(path, InputFormat.parquet, shard_bytes=1)
    assert [text for text in found if text is not None] == texts[:200] + texts[400:]
    assert damages.count(Damage.unreadable) == 1


def test_unusable_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 not really")
    files = list_inputs([str(path)], format=InputFormat.auto, pattern=None)
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        cut_shards(files, column="text")
    pq.write_table(pa.table({"text": [1, 2], "t": ["a", "b"]}), path)
    files = list_inputs([str(path)], format=InputFormat.auto, pattern=None)
    with pytest.raises(ValueError, match="no column 'body', only: text, t"):
        cut_shards(files, column="body")
    with pytest.raises(ValueError, match="column 'text' holds int64, not text"):
        cut_shards(files, column="text")


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if path.suffix == ".jsonl" else name)
    found = list_inputs([str(tmp_path)], format=InputFormat.auto, pattern=None)
    names = [str(Path(file.path).relative_to(tmp_path)) for file in found]
    assert names == ["a.jsonl", "b/1.txt", "b/2.txt"]
    formats = [file.format for file in found]
    assert formats == [InputFormat.jsonl, InputFormat.text, InputFormat.text]
    markdown = list_inputs([str(tmp_path)], format=InputFormat.text, pattern="*.md")
    assert [Path(file.path).name for file in markdown] == ["c.md"]


def test_unusable_inputs(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="input nowhere does not exist"):
        list_inputs(["nowhere"], format=InputFormat.auto, pattern=None)
    with pytest.raises(ValueError, match=r"holds no file named like \*\.jsonl, "):
        list_inputs([str(tmp_path)], format=InputFormat.jsonl, pattern=None)
    with pytest.raises(ValueError, match="named twice"):
        list_inputs([str(tmp_path), str(tmp_path / "x.txt")], format=InputFormat.text, pattern=None)


def test_small_files_share_a_shard_and_large_ones_do_not(tmp_path: Path) -> None:
    for number, size in enumerate([10, 10, 10, 95, 10, 300, 10]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    files = list_inputs([str(tmp_path)], format=InputFormat.text, pattern=None)
    shards = cut_shards(files, column="text", shard_bytes=100)
    assert [[piece.file for piece in pieces] for pieces in shards] == [
        [0, 1, 2],
        [3],
        [4],
        [5],
        [6],
    ]


def test_a_byte_order_mark_drops_nothing_and_gets_into_nothing(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    path = tmp_path / "x.jsonl"
    joined = mark + b'{"text": "a"}\n' + mark + b'{"text": "b"}\r\n{"text": "\xef\xbb\xbfc"}\n'
    path.write_bytes(joined + b'{"text": "\\ufeffd\\ufeff"}\n' + mark + b"\n")
    texts, damages, _ = read_all(path, InputFormat.auto, shard_bytes=9)
    assert texts == ["a", "b", "c", "d\ufeff", None]
    assert damages == [None, None, None, None, Damage.empty]
    path = tmp_path / "x.txt"
    path.write_bytes(mark + b"a\n")
    assert read_all(path, InputFormat.auto, shard_bytes=9)[0] == ["a\n"]
    path.write_bytes(mark + b"a\n" + mark + b"b")
    assert read_all(path, InputFormat.lines, shard_bytes=3)[0] == ["a", "b"]


def test_the_column_meant_is_the_column_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(ValueError, match="has 2 columns named 'text': rename all but one"):
        read_all(path, InputFormat.auto, shard_bytes=1)
    pq.write_table(pa.table([["x"], ["y"]], names=["body", "body"]), path)
    with pytest.raises(ValueError, match="no column 'text', only: body, body"):
        read_all(path, InputFormat.auto, shard_bytes=1)
    pq.write_table(pa.table({"text": [{"text": "nested"}]}), path)
    with pytest.raises(ValueError, match=r"'text' holds struct<text: string>, not text"):
        read_all(path, InputFormat.auto, shard_bytes=1)
    with pytest.raises(ValueError, match=r"no column 'text\.text', only: text"):
        read_all(path, InputFormat.auto, shard_bytes=1, column="text.text")
    pq.write_table(pa.table({"text": [b"bytes"]}), path)
    with pytest.raises(ValueError, match="holds binary, not text"):
        read_all(path, InputFormat.auto, shard_bytes=1)


def test_columns_without_any_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.nulls(2)}), path)
    texts, damages, _ = read_all(path, InputFormat.auto, shard_bytes=1)
    assert (texts, damages) == ([None, None], [Damage.missing_field] * 2)
    pq.write_table(pa.table({"text": pa.array([], type=pa.string())}), path)
    assert read_all(path, InputFormat.auto, shard_bytes=1)[0] == []


def test_bytes_in_a_text_column_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        raw = pa.array([b"a", b"\xff", b"b"], type=pa.binary())
        if kind == pa.string_view():
            raw = raw.cast(pa.binary_view())
        elif kind == pa.large_string():
            raw = raw.cast(pa.large_binary())
        column = raw.view(kind)
        pq.write_table(pa.table({"text": column}), path)
        texts, damages, _ = read_all(path, InputFormat.auto, shard_bytes=1)
        assert texts == ["a", None, "b"], kind
        assert damages == [None, Damage.undecodable, None]
