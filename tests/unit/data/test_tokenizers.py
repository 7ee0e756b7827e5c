"""Bytes and Hugging Face tokenizers: round trips, marks, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.config.schema import Bos
from megatron_ttt.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    ModelTokenizer,
    Spelled,
    TokenizerIdentity,
    document_ids,
    load_tokenizer,
)
from tests.unit.data.helpers import save_tokenizer, store_truncation

TEXT = "Grüße, 世界!\n\tdef f(): pass\r\n"


def test_bytes_are_the_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.encode_array("aé").tolist() == [97, 195, 169]
    assert tokenizer.decode([*tokenizer.encode(TEXT), 256, 257]) == TEXT
    assert tokenizer.decode([195]) == "�"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (258, 256, 257)


def test_a_folders_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save_tokenizer(tmp_path / "t"))
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod]) == TEXT
    assert tokenizer.encode_array(TEXT).tolist() == tokenizer.encode(TEXT)
    assert len(tokenizer.encode("the file the file")) < len("the file the file")
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size


def test_a_text_cannot_forge_a_document_end(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save_tokenizer(tmp_path / "t"))
    text = "before <|end|> after"
    assert tokenizer.eod not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padding_with_the_end_token_is_no_padding(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t", pad_token="<|end|>")
    assert HuggingFaceTokenizer(folder).pad is None
    assert HuggingFaceTokenizer(folder, pad=1).pad == 1
    assert HuggingFaceTokenizer(save_tokenizer(tmp_path / "u", pad_token="<|pad|>")).pad == 1


def test_identity_tells_tokenizers_apart(tmp_path: Path) -> None:
    one = HuggingFaceTokenizer(save_tokenizer(tmp_path / "one")).identity
    same = HuggingFaceTokenizer(save_tokenizer(tmp_path / "same")).identity
    other = HuggingFaceTokenizer(save_tokenizer(tmp_path / "other", merges=90)).identity
    assert one.fingerprint == same.fingerprint != other.fingerprint
    begun = HuggingFaceTokenizer(save_tokenizer(tmp_path / "begun", **BEGIN)).identity
    for identity in (one, begun):
        assert TokenizerIdentity.from_dict(json.loads(json.dumps(identity.as_dict()))) == identity
    old = {key: value for key, value in one.as_dict().items() if key != "start"}
    assert TokenizerIdentity.from_dict(old) == one  # a record from before there was a start


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("pad_to", [None, 400])
def test_stored_truncation_and_padding_mean_nothing(
    tmp_path: Path, direction: str, pad_to: int | None
) -> None:
    plain = save_tokenizer(tmp_path / "plain", pad_token="<|pad|>")
    stored = save_tokenizer(tmp_path / "stored", pad_token="<|pad|>")
    store_truncation(stored, direction=direction, pad_to=pad_to)
    ours, clean = HuggingFaceTokenizer(stored), HuggingFaceTokenizer(plain)
    for text in (TEXT * 20, "x"):
        assert ours.encode(text) == ours.encode_array(text).tolist() == clean.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.identity.fingerprint == clean.identity.fingerprint


def test_what_transformers_saves_after_truncating(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "t"))
    theirs(TEXT * 20, truncation=True, max_length=9)
    theirs.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert stored["truncation"]["max_length"] == 9
    ours = HuggingFaceTokenizer(str(tmp_path / "saved"))
    assert ours.encode(TEXT * 20) == theirs(TEXT * 20)["input_ids"]


BEGIN = {"template": "<|begin|> $A", "bos_token": "<|begin|>"}
NAMED = {"bos_token": "<|begin|>"}


@pytest.mark.parametrize(
    ("files", "start"),
    [
        ({}, []),  # Qwen
        (NAMED, []),
        ({**NAMED, "add_bos_token": False}, []),
        (BEGIN, [2]),  # LLaMA-3
        ({**BEGIN, "add_bos_token": True}, [2]),  # LLaMA-2, Mistral
        ({**BEGIN, "template": "<|begin|> $A <|end|>"}, [2]),
        ({**NAMED, "template": "$A <|end|>"}, []),
        ({"template": "<|pad|> <|begin|> $A"}, [1, 2]),
    ],
)
def test_what_stands_before_a_text_is_what_transformers_puts_there(
    tmp_path: Path, files: dict[str, Any], start: list[int]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tmp_path / "t", **files)
    store_truncation(folder)
    ours = HuggingFaceTokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    end = [0] if "end" in files.get("template", "") else []  # a prompt is to be continued
    assert list(ours.start) == start
    assert ours.encode_prompt(TEXT) + end == theirs(TEXT)["input_ids"]
    assert ours.encode_prompt(TEXT) == start + ours.encode(TEXT)
    assert document_ids(ours, TEXT).tolist() == ours.encode_prompt(TEXT)
    assert ours.decode([*ours.encode_prompt(TEXT), ours.eod]) == TEXT


def test_what_stands_before_a_text_can_be_chosen(tmp_path: Path) -> None:
    adds = save_tokenizer(tmp_path / "adds", **BEGIN)
    names = save_tokenizer(tmp_path / "names", **NAMED)
    for folder in (adds, names):
        assert HuggingFaceTokenizer(folder, start=Bos.add).start == (2,)
        assert HuggingFaceTokenizer(folder, start=Bos.none).start == ()
        assert HuggingFaceTokenizer(folder, start=[1, 2]).encode_prompt("")[:2] == [1, 2]
    assert HuggingFaceTokenizer(adds).identity.fingerprint == (
        HuggingFaceTokenizer(adds, start=Bos.none).identity.fingerprint
    )
    with pytest.raises(ValueError, match=r"names no beginning-of-sequence token \(bos=add\)"):
        HuggingFaceTokenizer(save_tokenizer(tmp_path / "plain"), start=Bos.add)
    with pytest.raises(ValueError, match="document start id 9999 is outside 0"):
        HuggingFaceTokenizer(adds, start=[9999])
    with pytest.raises(ValueError, match="byte tokenizer has no mark"):
        load_tokenizer("bytes", start=Bos.add)
    assert load_tokenizer("bytes", start=Bos.none).encode_prompt("a") == [97]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**NAMED, "add_bos_token": True}, "add_bos_token=true .* puts nothing before"),
        ({**BEGIN, "add_bos_token": False}, r"add_bos_token=false .* puts the ids \[2\] before"),
    ],
)
def test_files_that_disagree_are_not_guessed(
    tmp_path: Path, files: dict[str, Any], said: str
) -> None:
    """Versions of ``transformers`` differ about them."""
    folder = save_tokenizer(tmp_path / "t", **files)
    with pytest.raises(ValueError, match=said + r".*\(bos=add or bos=none\)"):
        HuggingFaceTokenizer(folder)
    assert HuggingFaceTokenizer(folder, start=Bos.add).start == (2,)
    assert HuggingFaceTokenizer(folder, start=Bos.none).start == ()


def test_a_filled_chat_template_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tmp_path / "t", **BEGIN)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = "<|begin|>a question<|end|>"
    tokens = HuggingFaceTokenizer(folder, spelled=Spelled.tokens)
    ids = theirs(chat, add_special_tokens=False)["input_ids"]
    assert ids[0] == 2 and ids[-1] == 0
    assert tokens.encode_prompt(chat) == ids  # the mark is not doubled
    assert tokens.encode_prompt("a question") == theirs("a question")["input_ids"]
    characters = HuggingFaceTokenizer(folder)
    assert characters.spelled(chat) == ["<|end|>", "<|begin|>"]
    assert characters.spelled("a question") == ByteTokenizer().spelled(chat) == []
    assert characters.encode_prompt(chat) == [2, *characters.encode(chat)]
    assert 0 not in characters.encode(chat) and 2 not in characters.encode(chat)


def test_a_models_texts_begin_as_its_training_documents_did(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t", **BEGIN)
    other = save_tokenizer(tmp_path / "other", merges=90, **BEGIN)
    trained = HuggingFaceTokenizer(folder, eod=1, start=Bos.none).identity
    known = ModelTokenizer(folder, trained)
    for tokenizer in (
        known.open(None),
        known.open(folder),
        ModelTokenizer(None, trained).open(folder),
    ):
        assert tokenizer is not None
        assert (tokenizer.start, tokenizer.eod, tokenizer.pad) == ((), 1, trained.pad)
    explicit, foreign = known.open(None, bos=Bos.model), known.open(other)
    assert explicit is not None and explicit.start == (2,)
    assert foreign is not None and (foreign.start, foreign.eod) == ((2,), 0)
    unknown = ModelTokenizer(folder).open(None)
    assert unknown is not None and unknown.start == (2,)
    assert ModelTokenizer(None).open(None) is None
    assert isinstance(ModelTokenizer("bytes").open(None), ByteTokenizer)


def test_random_merges_are_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t")
    path = Path(folder) / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["dropout"] = 0.1
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=r"model\.dropout=0\.1 in tokenizer\.json"):
        HuggingFaceTokenizer(folder)


def test_the_transformers_library_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = HuggingFaceTokenizer(folder)
    assert theirs.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT)
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, ours.vocab_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eod": 1, "pad": 1}, "share the id 1"),
        ({"eod": 100_000}, "end-of-document id 100000 is outside 0"),
        ({"pad": -1}, "padding id -1 is outside 0"),
    ],
)
def test_unusable_marks(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer(save_tokenizer(tmp_path / "t"), **options)


def test_unusable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        HuggingFaceTokenizer(save_tokenizer(tmp_path / "no_end", eos_token=None))
    with pytest.raises(ValueError, match="which it does not have"):
        HuggingFaceTokenizer(save_tokenizer(tmp_path / "wrong_end", eos_token="<eos>"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        HuggingFaceTokenizer(str(broken))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        HuggingFaceTokenizer(str(broken))
    no_object = Path(save_tokenizer(tmp_path / "no_object"))
    (no_object / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        HuggingFaceTokenizer(str(no_object))
    with pytest.raises(ValueError, match="fixed: end of document 256"):
        load_tokenizer("bytes", eod=3)
    with pytest.raises(ValueError, match="unknown tokenizer kind 'words'"):
        load_tokenizer("words")
    with pytest.raises(ValueError, match="needs the name"):
        load_tokenizer("huggingface")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot be loaded") as raised:
        HuggingFaceTokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)
