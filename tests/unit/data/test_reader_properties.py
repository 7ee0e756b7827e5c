"""Whatever texts a file holds and however it is cut, they are read back as they were written."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttt.data.inputs import InputFormat, list_inputs
from megatron_ttt.data.readers import Damage, cut_shards, read_documents, read_piece

MARK = "\ufeff"
TEXTS = st.text(max_size=20) | st.sampled_from(["", " ", MARK, MARK + "a", "\0", "\r\n", "\x1e{"])
ANY_TEXTS = TEXTS | st.text(st.characters(exclude_categories=()), max_size=5)  # surrogates too
VALUES = st.none() | st.booleans() | st.integers() | st.lists(TEXTS, max_size=2)
DAMAGED = [b"{", b"[]", b"null", b"\xff", b'{"text"}', b"{}", b'{"text": "a\x01"}', b'"text"']
TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


def usable(text: object) -> str | None:
    """The document that a field makes; None: none."""
    if not isinstance(text, str):
        return None
    text = text.removeprefix(MARK)
    whole = not any(0xD800 <= ord(letter) < 0xE000 for letter in text)
    return text if whole and text.strip() else None


def read_back(path: Path, format: InputFormat, shard_bytes: int) -> list[str | None]:
    """Texts in order, cut into shards; the same as those of the whole file."""
    files = list_inputs([str(path)], format=format, pattern=None)
    shards = cut_shards(files, column="text", shard_bytes=shard_bytes)
    pieces = [piece for pieces in shards for piece in pieces]
    found = [
        document
        for piece in pieces
        for document in read_piece(files[0], piece, json_key="text", column="text")
    ]
    whole = list(read_documents(files, json_key="text", column="text"))
    assert [(document.text, document.damage) for document in found] == [
        (document.text, document.damage) for _, document in whole
    ]
    assert [where for where, _ in whole] == [f"{path}:{n + 1}" for n in range(len(whole))]
    assert all((d.text is None) == isinstance(d.damage, Damage) for d in found)
    return [document.text for document in found]


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(
        st.tuples(ANY_TEXTS | VALUES, st.booleans(), st.booleans())
        | st.sampled_from(DAMAGED)
        | st.just(b""),
        max_size=12,
    ),
    end=st.sampled_from([b"\n", b"\r\n"]),
    marked=st.booleans(),
    ended=st.booleans(),
    shard_bytes=st.integers(1, 90),
    suffix=st.sampled_from([".jsonl", ".JSON", ".ndjson"]),
)
def test_jsonl(
    records: list[tuple[object, bool, bool] | bytes],
    end: bytes,
    marked: bool,
    ended: bool,
    shard_bytes: int,
    suffix: str,
) -> None:
    lines = [b'{"text": "first"}']  # what tells a .json from any other
    expected: list[str | None] = ["first"]
    for record in records:
        if isinstance(record, bytes):
            lines.append(record)
            expected.append(None)
            continue
        text, escaped, more = record
        other = {"id": 1, "nested": {"text": "no"}} if more else {}
        whole = json.dumps({**other, "text": text}, ensure_ascii=escaped)
        lines.append(whole.encode("utf-8", "surrogatepass"))
        expected.append(usable(text))
    content = end.join(lines) + (end if ended else b"")
    if not ended and lines[-1] == b"":
        expected.pop()  # an empty line that nothing ends is none
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes((MARK.encode() if marked else b"") + content)
        assert read_back(path, InputFormat.auto, shard_bytes) == expected


@settings(max_examples=80, deadline=None)
@given(
    # without NULs: in a short file they say UTF-16, which is refused by name
    texts=st.lists(
        TEXTS.map(lambda text: text.replace("\n", "").replace("\0", "").rstrip("\r")), max_size=12
    ),
    end=st.sampled_from([b"\n", b"\r\n"]),
    marked=st.booleans(),
    shard_bytes=st.integers(1, 60),
)
def test_lines(texts: list[str], end: bytes, marked: bool, shard_bytes: int) -> None:
    content = b"".join(text.encode() + end for text in ["first", *texts])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.txt"
        path.write_bytes((MARK.encode() if marked else b"") + content)
        found = read_back(path, InputFormat.lines, shard_bytes)
    # a line may begin with a mark that joining files left there, and its text with another
    expected = [usable(text.removeprefix(MARK)) for text in ["first", *texts]]
    assert found == expected


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(TEXTS | st.none(), max_size=12),
    type=st.sampled_from(TYPES),
    rows=st.integers(1, 5),
    before=st.sampled_from([[], ["id"], ["text.a", "other"]]),
    shard_bytes=st.integers(1, 300),
)
def test_parquet(
    texts: list[str | None], type: pa.DataType, rows: int, before: list[str], shard_bytes: int
) -> None:
    column = pa.array(texts, type=pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(type) else column
    columns = [pa.array(["wrong"] * len(texts)) for _ in before]
    table = pa.table([*columns, column.cast(type)], names=[*before, "text"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        pq.write_table(table, path, row_group_size=rows)
        assert read_back(path, InputFormat.auto, shard_bytes) == [usable(t) for t in texts]
