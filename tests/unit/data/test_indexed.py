"""The files are Megatron's own, byte for byte, and every kind of damage is named before use."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ttt.data.checks import (
    IndexedDatasetError,
    check_indexed_dataset,
    check_token_range,
    scan_token_range,
)
from megatron_ttt.data.indexed import (
    HEADER_BYTES,
    IndexedWriter,
    Sidecar,
    bin_path,
    idx_path,
    merge_indexed,
    sidecar_path,
    token_dtype,
)
from megatron_ttt.data.tokenizers import ByteTokenizer

DOCUMENTS = [[5, 6, 7, 256], [256], [1, 2, 3, 4, 5, 6, 256], [250, 256]]


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.asarray(document))
    return prefix


def write_sidecar(prefix: Path, documents: list[list[int]]) -> None:
    Sidecar(
        tokenizer=ByteTokenizer().identity,
        dtype="uint16",
        documents=len(documents),
        tokens=sum(map(len, documents)),
        pad_tokens=0,
        text_bytes=0,
        max_token_id=256,
        align=0,
        longest_document_tokens=7,
        longest_source="x",
        skipped={},
    ).write(sidecar_path(prefix))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatrons_builder(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs


def test_merged_parts_equal_one_writing(tmp_path: Path) -> None:
    parts = [DOCUMENTS[:1], [], DOCUMENTS[1:3], DOCUMENTS[3:]]
    prefixes = [write(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    merge_indexed(prefixes, tmp_path / "merged", np.dtype(np.uint16))
    whole = write(tmp_path / "whole", DOCUMENTS)
    assert idx_path(tmp_path / "merged").read_bytes() == idx_path(whole).read_bytes()
    assert bin_path(tmp_path / "merged").read_bytes() == bin_path(whole).read_bytes()
    read = IndexedDataset(str(tmp_path / "merged"))
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS


def test_an_exception_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as w:
        w.add(np.asarray([1]))
        raise ZeroDivisionError
    assert not idx_path(tmp_path / "x").exists()


def test_type_follows_the_vocabulary() -> None:
    assert token_dtype(258) == np.uint16
    assert token_dtype(151936) == np.int32


def test_facts_of_a_good_dataset(tmp_path: Path) -> None:
    prefix = write(tmp_path / "good", DOCUMENTS)
    facts = check_indexed_dataset(prefix)
    assert (facts.documents, facts.tokens, facts.bin_bytes) == (4, 14, 28)
    assert facts.sidecar is None
    assert scan_token_range(facts) == (1, 256)
    write_sidecar(prefix, DOCUMENTS)
    sidecar = check_indexed_dataset(prefix).sidecar
    assert sidecar is not None
    assert sidecar.tokenizer.eod == 256


def test_layout_key_tells_orders_apart(tmp_path: Path) -> None:
    one = check_indexed_dataset(write(tmp_path / "one", DOCUMENTS))
    other = check_indexed_dataset(write(tmp_path / "other", DOCUMENTS[::-1]))
    assert one.layout_key != other.layout_key


def edit(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


LENGTHS, POINTERS = HEADER_BYTES, HEADER_BYTES + 4 * len(DOCUMENTS)
LISTED = POINTERS + 8 * len(DOCUMENTS)
DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no idx": (lambda idx, data: idx.unlink(), r"x\.idx does not exist"),
    "no bin": (lambda idx, data: data.unlink(), r"x\.bin does not exist"),
    "empty idx": (lambda idx, data: idx.write_bytes(b""), "is no Megatron index"),
    "magic": (lambda idx, data: edit(idx, 0, b"PK"), "is no Megatron index: it starts with b'PK"),
    "cut header": (
        lambda idx, data: idx.write_bytes(idx.read_bytes()[:20]),
        r"truncated inside its header \(20 bytes\)",
    ),
    "version": (lambda idx, data: edit(idx, 9, struct.pack("<Q", 2)), "index version 2"),
    "type": (lambda idx, data: edit(idx, 17, b"\x06"), "token type code 6"),
    "count": (
        lambda idx, data: edit(idx, 18, struct.pack("<Q", 5)),
        "where 5 sequences and 5 document entries",
    ),
    "huge count": (lambda idx, data: edit(idx, 18, b"\xff" * 8), "truncated or damaged"),
    "cut idx": (
        lambda idx, data: idx.write_bytes(idx.read_bytes()[:-1]),
        "truncated or damaged",
    ),
    "modes": (lambda idx, data: idx.write_bytes(idx.read_bytes() + bytes(4)), "multimodal"),
    "negative length": (
        lambda idx, data: edit(idx, LENGTHS + 4, struct.pack("<i", -1)),
        "gives sequence 1 the length -1",
    ),
    "length": (
        lambda idx, data: edit(idx, LENGTHS, struct.pack("<i", 400)),
        "points sequence 1 to byte 8",
    ),
    "pointer": (
        lambda idx, data: edit(idx, POINTERS + 24, struct.pack("<q", 1 << 40)),
        "points sequence 3 to byte 1099511627776",
    ),
    "document list end": (
        lambda idx, data: edit(idx, LISTED + 32, struct.pack("<q", 3)),
        "from 0 to 3, not from 0 to 4",
    ),
    "document list order": (
        lambda idx, data: edit(idx, LISTED + 8, struct.pack("<q", 4)),
        "not increasing",
    ),
    "cut bin": (
        lambda idx, data: data.write_bytes(data.read_bytes()[:-2]),
        "has 26 bytes where x.idx describes 14 tokens",
    ),
    "long bin": (
        lambda idx, data: data.write_bytes(data.read_bytes() + b"ab"),
        "has 30 bytes where",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    prefix = write(tmp_path / "x", DOCUMENTS)
    damage(idx_path(prefix), bin_path(prefix))
    with pytest.raises(IndexedDatasetError, match=message) as raised:
        check_indexed_dataset(prefix)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_no_documents_and_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(IndexedDatasetError, match="holds no documents"):
        check_indexed_dataset(write(tmp_path / "x", []))
    with pytest.raises(IndexedDatasetError, match="without a single token"):
        check_indexed_dataset(write(tmp_path / "y", [[], []]))


def test_a_suffix_in_the_prefix_is_explained(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    with pytest.raises(IndexedDatasetError, match="a prefix is the path without its suffix"):
        check_indexed_dataset(bin_path(prefix))


def test_foreign_sidecars(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    write_sidecar(prefix, DOCUMENTS[1:])
    with pytest.raises(IndexedDatasetError, match=r"describes 3 documents, 10 tokens .* has 4, 14"):
        check_indexed_dataset(prefix)
    for content in ("not json", "{}", "[]", '{"version": 99}'):
        sidecar_path(prefix).write_text(content)
        with pytest.raises(IndexedDatasetError, match="is not a dataset's sidecar"):
            check_indexed_dataset(prefix)


def test_token_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    facts = check_indexed_dataset(write(tmp_path / "x", DOCUMENTS))
    check_token_range(facts, *scan_token_range(facts), vocab_size=257)
    with pytest.raises(IndexedDatasetError, match=r"token id 256.*model.vocab_size=256"):
        check_token_range(facts, *scan_token_range(facts), vocab_size=256)
    negative = check_indexed_dataset(write(tmp_path / "y", [[3, -2]], np.int32))
    with pytest.raises(IndexedDatasetError, match="negative token id -2"):
        check_token_range(negative, *scan_token_range(negative), vocab_size=256)
