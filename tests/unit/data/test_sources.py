"""What stood before documents when data were prepared, and what a run says about it."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ttt.config.schema import Bos, DataConfig, TokenizerConfig, TokenizerKind
from megatron_ttt.data.indexed import sidecar_path
from megatron_ttt.data.preprocessing import PreprocessOptions, preprocess
from megatron_ttt.data.sources import open_source
from megatron_ttt.data.tokenizers import TokenizerIdentity
from tests.unit.data.helpers import make_text, save_tokenizer, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "t", template="<|begin|> $A", bos_token="<|begin|>")


def prepared(tmp_path: Path, tokenizer: str, bos: Bos) -> str:
    text = tmp_path / "x.txt"
    text.write_text(make_text(1, 90))
    output = str(tmp_path / bos.value)
    preprocess(
        PreprocessOptions(
            inputs=(str(text),),
            output=output,
            tokenizer_kind="bytes" if tokenizer == "bytes" else "huggingface",
            tokenizer_name=tokenizer,
            bos=bos,
        )
    )
    return output


def opened(
    path: str | list[str], name: str | None = None, bos: Bos | None = None
) -> TokenizerIdentity:
    tokenizer = TokenizerConfig(kind=TokenizerKind.huggingface, name=name, bos=bos)
    data = DataConfig(path=path, tokenizer=tokenizer)
    source = open_source(data, vocab_size=999, is_builder=True, barrier=lambda: None)
    return source.tokenizer


def test_a_run_takes_what_the_data_say(tmp_path: Path, folder: str) -> None:
    begun, bare = prepared(tmp_path, folder, Bos.model), prepared(tmp_path, folder, Bos.none)
    assert opened(begun).start == opened(begun, folder).start == (2,)
    assert opened(bare).start == opened(bare, folder).start == ()
    for bos in (Bos.model, Bos.add):
        assert opened(begun, bos=bos).start == (2,)
    assert opened(bare, bos=Bos.none).start == ()


@pytest.mark.parametrize("bos", [Bos.model, Bos.add, Bos.none])
def test_a_run_that_says_otherwise_is_refused(tmp_path: Path, folder: str, bos: Bos) -> None:
    path = prepared(tmp_path, folder, Bos.model if bos is Bos.none else Bos.none)
    wanted, found = r"the ids \[2\]", "no mark"
    if bos is Bos.none:
        wanted, found = found, wanted
    said = f"bos={bos.value} means {wanted} before a document, but those of .* begin with {found}"
    with pytest.raises(ValueError, match=said) as raised:
        opened(path, bos=bos)
    assert "\n" not in str(raised.value)


def test_blended_documents_begin_alike(tmp_path: Path, folder: str) -> None:
    paths = [prepared(tmp_path, folder, bos) for bos in (Bos.model, Bos.none)]
    with pytest.raises(ValueError, match=r"none begin with no mark, those of .*model with the ids"):
        opened(paths)


def test_a_record_from_before_there_was_a_mark(tmp_path: Path, folder: str) -> None:
    path = prepared(tmp_path, folder, Bos.none)
    sidecar = sidecar_path(path)
    text = sidecar.read_text()
    old = text.replace(',\n    "start": []', "")
    assert old != text
    sidecar.write_text(old)
    assert opened(path).start == ()
    with pytest.raises(ValueError, match="begin with no mark"):
        opened(path, bos=Bos.model)


def test_data_without_a_record_show_how_they_begin(tmp_path: Path, folder: str) -> None:
    begun = write_dataset(tmp_path / "begun", [[2, *range(50, 99), 0]] * 9)
    bare = write_dataset(tmp_path / "bare", [[*range(50, 99), 0]] * 9)
    assert opened(begun, folder).start == (2,)
    assert opened(bare, folder).start == ()
    with pytest.raises(ValueError, match=r"bos=model means the ids \[2\] .* begin with no mark"):
        opened(bare, folder, Bos.model)


def test_bytes_have_no_mark(tmp_path: Path) -> None:
    path = prepared(tmp_path, "bytes", Bos.model)
    tokenizer = TokenizerConfig(kind=TokenizerKind.bytes)
    for bos in (None, Bos.model, Bos.none):
        data = DataConfig(path=path, tokenizer=replace(tokenizer, bos=bos))
        source = open_source(data, vocab_size=258, is_builder=True, barrier=lambda: None)
        assert source.tokenizer.start == ()
    data = DataConfig(path=path, tokenizer=replace(tokenizer, bos=Bos.add))
    with pytest.raises(ValueError, match="byte tokenizer has no mark"):
        open_source(data, vocab_size=258, is_builder=True, barrier=lambda: None)
