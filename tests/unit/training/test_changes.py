"""The table of docs/checkpoints.md, row by row: what may change between runs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.checkpoints.progress import BEGINNING
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.load import to_yaml
from megatron_ttt.config.run_directory import CONFIG_FILE, plain, run_directory_faults
from megatron_ttt.config.schema import Config
from megatron_ttt.data.fingerprint import fingerprint
from megatron_ttt.data.sources import open_source
from megatron_ttt.training.changes import check_changes
from megatron_ttt.training.checkpoint import Found
from tests.unit.config.compose import configured
from tests.unit.data.helpers import write_dataset

PAGE = Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md"
DOCUMENTS = [[d] * 60 + [256] for d in range(40)]
BASE = ("+model=tiny", "data.source=files", "data.path=corpus", "run.dir=run", "run.name=run")


@dataclass(frozen=True)
class Row:
    """What changes, and what is said to happen in the same folder and from another run."""

    example: str
    same: str
    other: str


def rows() -> list[Row]:
    """The table's."""
    section = PAGE.read_text().split("## What may change between runs")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(example, same, other) for _, example, same, other, _ in cells]


def facts_of(config: Config) -> dict[str, Any]:
    source = open_source(config.data, vocab_size=258, is_builder=True, barrier=lambda: None)
    return fingerprint(source)


def outcome(config: Config, found: Found, *, same: bool) -> str:
    """What really happens, in the table's words."""
    if same and run_directory_faults(config):
        return "refused"
    told: list[str] = []
    try:
        check_changes(found, config, facts_of(config), told.append)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    assert all("\n" not in line for line in told)
    return "reported" if told else "free"


def test_the_table_is_long() -> None:
    assert len(rows()) > 20 and {row.other for row in rows()} == {"free", "reported", "refused"}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.example)
def test_a_row_of_the_table(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "moved"):
        write_dataset(tmp_path / name, DOCUMENTS)
    write_dataset(tmp_path / "other", DOCUMENTS[:9])
    saved = configured(*BASE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG_FILE).write_text(to_yaml(saved))
    progress = BEGINNING
    for _ in range(10):
        progress = progress.after_step(4, seq_length=saved.train.seq_length)
    facts = {"config": plain(saved), "data": facts_of(saved)}
    words = re.findall("`([^`]+)`", row.example)
    for circumstance in re.findall(r"\*([^*]+)\*", row.example):
        if circumstance == "prepared again":
            write_dataset(tmp_path / "corpus", DOCUMENTS[::-1])
        elif circumstance == "another tokenizer":
            facts["data"]["tokenizer"]["fingerprint"] = "0" * 64
        else:
            assert circumstance == "older checkpoint"
            del facts["data"]
    assert words or "*" in row.example
    config, found = configured(*BASE, *words), Found(Path("step_00000010"), progress, facts)
    assert outcome(config, found, same=True) == row.same
    assert outcome(config, found, same=False) == row.other


def test_nothing_is_told_where_nothing_changed(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "corpus", DOCUMENTS)
    config = configured(*BASE[:2], f"data.path={prefix}")
    facts = {"config": plain(config), "data": facts_of(config)}
    assert outcome(config, Found(tmp_path, BEGINNING, facts), same=False) == "free"


def test_keys_that_are_newer_than_a_checkpoint_count_as_their_defaults(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "corpus", DOCUMENTS)
    config = configured(*BASE[:2], f"data.path={prefix}", f"run.dir={tmp_path}")
    facts = {"config": plain(config), "data": facts_of(config)}
    for group, key in (("data", "changed"), ("ttt", "decay"), ("train", "precision")):
        del facts["config"][group][key]
    assert outcome(config, Found(tmp_path, BEGINNING, facts), same=False) == "free"
    text = to_yaml(config).replace("  decay: 1.0\n", "")
    (tmp_path / CONFIG_FILE).write_text(text)
    assert text != to_yaml(config) and run_directory_faults(config) == []
