"""The data benchmark: it prepares, loads and compares with what a GPU takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmark import main

WORDS = ["data", "megabytes=1", "lengths=[256,1024]", "model=micro"]


def test_a_corpus_is_prepared_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.json"
    assert main([*WORDS, "utilisation=0.5", "device=h200", f"output={file}"]) == 0
    assert "micro on one h200 at 50%" in capsys.readouterr().out
    record = json.loads(file.read_text())
    prepared = record["preprocessing"]
    assert prepared["text_bytes"] >= 10**6
    # a byte is a token, and a document ends with one more
    assert prepared["text_bytes"] < prepared["tokens"] < 1.01 * prepared["text_bytes"]
    assert [row["length"] for row in record["loader"]] == [256, 1024]
    assert all(row["rate"] > 0 and row["consumed"] > 0 for row in record["loader"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("utilisation=0", "utilisation=0.0: must be above 0"),
        ("model=giant", "model=giant: no such model; choose one of llama3_1_8b, "),
        ("tokenizer=/no/such", "error: tokenizer /no/such cannot be loaded: "),
    ],
)
def test_mistakes_are_one_line(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
