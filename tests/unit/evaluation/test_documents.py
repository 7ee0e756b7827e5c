"""Rows of held-out text: where they begin, and what they hold."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_ttt.evaluation.documents import TextRows, _packed, _starts

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
