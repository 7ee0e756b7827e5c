"""Rows of held-out text: where they begin, and what they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from megatron_ttt.evaluation.documents import TextRows, _from_files, _packed, _starts
from megatron_ttt.evaluation.schema import EvaluationData
from tests.unit.data.helpers import save_tokenizer

EOD = 0


def documents() -> list[torch.Tensor]:
    """Of 3, 10 and 7 tokens; the first ends with the end-of-document token, the others do not."""
    return [torch.tensor([1, 2, EOD]), torch.arange(10, 20), torch.arange(30, 37)]


def test_a_row_is_the_start_of_a_document_longer_than_it() -> None:
    rows, longest = _starts(iter(documents()), length=6, rows=5)
    assert longest == 10
    assert [row.tolist() for row in rows] == [list(range(10, 17)), list(range(30, 37))]
    rows, _ = _starts(iter(documents()), length=6, rows=1)
    assert len(rows) == 1
    assert _starts(iter(documents()), length=10, rows=5) == ([], 10)


def test_packed_rows_share_the_token_between_them_and_mark_every_end() -> None:
    stream = [1, 2, EOD, *range(10, 20), EOD, *range(30, 37), EOD]
    rows, total = _packed(iter(documents()), length=6, rows=9, eod=EOD)
    assert total == len(stream)
    assert [row.tolist() for row in rows] == [stream[0:7], stream[6:13], stream[12:19]]
    assert _packed(iter(documents()), length=40, rows=2, eod=EOD)[0] == []


def test_a_digest_names_the_text() -> None:
    text = TextRows(torch.arange(12).reshape(3, 4), eod=11, pad=None)
    other = text.tokens_NR.clone()
    other[2, 1] += 1
    others = [
        replace(text, tokens_NR=other),
        replace(text, tokens_NR=text.tokens_NR.reshape(4, 3)),
        replace(text, eod=10),
        replace(text, pad=0),
    ]
    assert text.digest() == replace(text, tokens_NR=text.tokens_NR.clone()).digest()
    assert len({text.digest(), *(one.digest() for one in others)}) == 5


def texts_of(*paths: Path, format: InputFormat = InputFormat.auto) -> list[str]:
    data = EvaluationData(path=[str(path) for path in paths], format=format)
    tokenizer = ByteTokenizer()
    return [tokenizer.decode(ids.tolist()) for ids in _from_files(tokenizer, data)]


def test_files_are_read_as_preprocessing_reads_them(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"id": [1, 2, 3], "text": pa.array(["a", "b", "c"], type=pa.string_view())}),
        tmp_path / "x.PARQUET",
        row_group_size=1,
    )
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"text": "d"}\r\n\r\n{"text": "e"}\r\n')
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbff\r\n")
    paths = [tmp_path / name for name in ("x.PARQUET", "x.json", "x.txt")]
    assert texts_of(*paths) == ["a", "b", "c", "d", "e", "f\r\n"]


def test_files_that_cannot_be_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2 missing_field"):
        texts_of(path)
    path.write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(ValueError, match="one JSON array"):
        texts_of(path)
    records = tmp_path / "x.txt"
    records.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"give data\.format=jsonl or text"):
        texts_of(records)
    assert texts_of(records, format=InputFormat.jsonl) == ["a", "b"]


def test_shares_of_text_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("whole")
    data = EvaluationData(path=str(path), shares="50,25,25")
    with pytest.raises(ConfigError, match=r"^data\.shares=50,25,25: text files are read whole"):
        list(_from_files(ByteTokenizer(), data))


def test_documents_begin_with_the_tokenizers_mark(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "t", template="<|begin|> $A", bos_token="<|begin|>")
    path = tmp_path / "x.txt"
    path.write_text("the file")
    tokenizer = HuggingFaceTokenizer(name)
    (found,) = _from_files(tokenizer, EvaluationData(path=str(path)))
    assert found.tolist() == [2, *tokenizer.encode("the file")]
