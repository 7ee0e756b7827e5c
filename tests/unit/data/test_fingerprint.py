"""Other texts are told apart, the same texts elsewhere are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.config.schema import DataConfig, TokenizerConfig, TokenizerKind
from megatron_ttt.data import fingerprint as module
from megatron_ttt.data.fingerprint import content_digest, differences, fingerprint
from megatron_ttt.data.sources import open_source
from tests.unit.data.helpers import save_tokenizer, write_dataset

DOCUMENTS = [[d, d + 1, 256] for d in range(20)]


def facts(folder: Path, path: Any, tokenizer: TokenizerConfig | None = None) -> dict[str, Any]:
    """As a manifest gives it back."""
    kind = tokenizer or TokenizerConfig(kind=TokenizerKind.bytes)
    data = DataConfig(path=path, cache_dir=str(folder / "cache"), tokenizer=kind)
    source = open_source(data, vocab_size=400, is_builder=True, barrier=lambda: None)
    found = json.loads(json.dumps(fingerprint(source)))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def before(tmp_path: Path) -> dict[str, Any]:
    return facts(tmp_path, write_dataset(tmp_path / "d", DOCUMENTS))


def test_the_same_texts_in_another_place(tmp_path: Path, before: dict[str, Any]) -> None:
    elsewhere = write_dataset(tmp_path / "elsewhere" / "e", DOCUMENTS)
    assert differences(before, facts(tmp_path, elsewhere)) == []
    assert differences(before, facts(tmp_path, {elsewhere: 7.0})) == []


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([[d, d + 2, 256] for d in range(20)], "content"),  # rebuilt, all lengths equal
        (DOCUMENTS[::-1], "content"),  # shuffled
        (DOCUMENTS[:19], "documents 20 then, 19 now"),
        ([[0, 256], [1, 1, 2, 256], *DOCUMENTS[2:]], "lengths"),  # as many tokens and documents
    ],
)
def test_rebuilt_under_the_same_prefix(
    tmp_path: Path, before: dict[str, Any], documents: list[list[int]], expected: str
) -> None:
    prefix = write_dataset(tmp_path / "d", documents)
    (phrase,) = differences(before, facts(tmp_path, prefix))
    assert phrase.startswith(f"{prefix}: ") and expected in phrase


def test_another_blend(tmp_path: Path, before: dict[str, Any]) -> None:
    first, second = str(tmp_path / "d"), write_dataset(tmp_path / "e", DOCUMENTS[:10])
    both = facts(tmp_path, {first: 1, second: 1})
    assert differences(before, both) == ["datasets: 1 then, 2 now"]
    (one, two) = differences(both, facts(tmp_path, {first: 3, second: 1}))
    assert "share 0.5 then, 0.75 now" in one and "share 0.5 then, 0.25 now" in two
    assert differences(both, facts(tmp_path, {first: 5, second: 5})) == []
    assert differences(both, facts(tmp_path, {second: 1, first: 1}))  # interleaved differently


def test_another_tokenizer(tmp_path: Path, before: dict[str, Any]) -> None:
    """Of the same ids, as data without a record of its tokenizer has them."""
    name = save_tokenizer(tmp_path / "bpe")
    other = TokenizerConfig(kind=TokenizerKind.huggingface, name=name)
    (phrase,) = differences(before, facts(tmp_path, str(tmp_path / "d"), other))
    assert phrase.startswith("tokenizer: kind bytes then, huggingface now")


def test_facts_that_one_side_lacks_are_not_compared(before: dict[str, Any]) -> None:
    newer = json.loads(json.dumps(before))
    newer["datasets"][0]["added_later"] = 1
    newer["tokenizer"]["added_later"] = 1
    assert differences(before, newer) == differences(newer, before) == []


def test_of_a_large_file_pieces_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 1024)  # 256 pieces of 4 bytes
    path = tmp_path / "large.bin"
    content = bytearray(range(256)) * 32
    path.write_bytes(content)
    before = content_digest(path)
    found = 0
    for place in range(0, len(content), 64):
        path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
        found += content_digest(path) != before
    assert found == len(content) // 64, "a piece of every 32 bytes is read"
    path.write_bytes(content[:-1] + b"x")
    assert content_digest(path) != before, "the end is read"
