"""What a model reads of a text is what its own tokenizer makes of it, in every program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_ttt.config.schema import Bos
from megatron_ttt.conversion.opened import recorded_tokenizer
from megatron_ttt.data.tokenizers import HuggingFaceTokenizer
from megatron_ttt.inference import generation
from tests.unit.data.helpers import save_tokenizer, store_truncation
from tests.unit.hf.models import live_model
from tools import bake
from tools.generate import main

PROMPT = "def read(self, path): return the file that was read before"
CHAT = "<|begin|>def read(<|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A live model with a tokenizer that stores a truncation and adds a mark, as LLaMA-3's."""
    folder = tmp_path_factory.mktemp("model") / "exported"
    save_tokenizer(folder, template="<|begin|> $A", bos_token="<|begin|>")
    store_truncation(str(folder))
    live_model(dtype=torch.float32, vocab_size=318).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def read(folder: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """The rows that ``tools/generate.py`` has a model read."""
    rows: list[list[int]] = []
    inner = generation.generate

    def generate(reader: Any, given: list[list[int]], **options: Any) -> Any:
        rows[:] = given
        return inner(reader, given, **options)

    def call(*words: str) -> list[list[int]]:
        assert (
            main([f"checkpoint={folder}", "max_new_tokens=2", "beyond_positions=true", *words]) == 0
        )
        return list(rows)

    monkeypatch.setattr(generation, "generate", generate)
    return call


def ids(folder: str, text: str, **options: Any) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(folder)(text, **options)["input_ids"]
    return found


def test_a_prompt_is_read_as_transformers_reads_it(
    folder: str, read: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    whole = ids(folder, PROMPT)
    assert whole[0] == 2 and len(whole) > 9  # what the file stores as its truncation
    assert read(f"prompt={PROMPT}", "prompt=x") == [whole, ids(folder, "x")]
    assert read(f"prompt={PROMPT}", "bos=none") == [whole[1:]]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    assert read(f"read={path}") == read(f"prompt_file={path}") == [whole]


def test_a_session_begins_once(
    folder: str, read: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    talk = f"session={tmp_path / 'talk'}"
    assert read(talk, f"prompt={PROMPT}") == [ids(folder, PROMPT)]
    (row,) = read(talk, "prompt=and then")
    assert 2 not in row
    assert row[1:] == ids(folder, "and then", add_special_tokens=False)  # behind what was unread


def test_a_memory_is_read_from_its_beginning(
    folder: str, read: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    memory = str(tmp_path / "memory")
    read(f"prompt={PROMPT}", f"save_memory={memory}")
    assert read(f"memory={memory}", "prompt=and then") == [ids(folder, "and then")]


def test_special_tokens_in_a_prompt_are_told_or_read(
    folder: str, read: Callable[..., list[list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = read(f"prompt={CHAT}")
    assert row[0] == 2 and 0 not in row and 2 not in row[1:]
    assert "<|begin|>, <|end|>: read as ordinary characters" in capsys.readouterr().err
    chat = ids(folder, CHAT, add_special_tokens=False)
    assert (chat[0], chat[-1]) == (2, 0)
    assert read(f"prompt={CHAT}", "special_tokens=tokens") == [chat]
    assert "ordinary characters" not in capsys.readouterr().err


def test_a_baked_text_is_read_from_its_beginning(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[int]] = []

    def baked(backend: Any, source: Any, out: Any, tokens: Any, probe: Any, **_: Any) -> None:
        found[:] = [tokens, probe]
        raise ValueError("enough")

    monkeypatch.setattr("megatron_ttt.inference.baking.bake", baked)
    path = tmp_path / "book.txt"
    path.write_text(PROMPT)
    whole = ids(folder, PROMPT)
    words = [f"checkpoint={folder}", f"output={tmp_path / 'out'}", f"read={path}", "probe_tokens=5"]
    assert bake.main(words) == 2 and found == [whole, [2, *whole[-4:]]]
    assert bake.main([*words, "bos=none"]) == 2 and found == [whole[1:], whole[-5:]]
    assert bake.main([*words, f"probe={path}"]) == 2 and found == [whole, whole[:5]]


def test_a_checkpoint_tells_its_tokenizer(folder: str, tmp_path: Path) -> None:
    identity = HuggingFaceTokenizer(folder, eod=1, start=Bos.none).identity

    def told(data: dict[str, Any] | None, **named: Any) -> tuple[str | None, tuple[int, ...]]:
        config = {"data": {"tokenizer": named}}
        facts = {"config": config} if data is None else {"config": config, "data": data}
        known = recorded_tokenizer(SimpleNamespace(facts=facts, path=tmp_path))  # type: ignore[arg-type]
        opened = known.open(None)
        return known.name, () if opened is None else (opened.eod, *opened.start)

    recorded = {"tokenizer": identity.as_dict()}
    assert told(recorded, kind="huggingface", name=None) == (folder, (1,))
    assert told(recorded, kind="huggingface", name=folder) == (folder, (1,))
    assert told(None, kind="huggingface", name=folder) == (folder, (0, 2))
    assert told(None, kind="huggingface", name=None) == (None, ())
    assert told(None, kind="bytes") == ("bytes", (256,))
