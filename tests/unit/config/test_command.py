"""The grammar of the programs: typed keys, texts as typed, earlier spellings, mistakes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
from omegaconf import MISSING

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.config.command import Command, key_types, run_command
from megatron_ttt.config.effects import Condition
from megatron_ttt.config.reading import ReadingMode, ReadingRule
from tests.unit.config.test_values import EDGES


class Rest(Enum):
    flush = "flush"
    drop = "drop"


@dataclass
class Keys:
    """Read a checkpoint."""

    checkpoint: Path = MISSING  # a folder, or a run
    prompt: list[str] = field(default_factory=list)
    tokenizer: str | None = "bytes"
    steps: int = 3
    share: float | None = None
    stop: list[int] | None = None
    verify: bool = False
    beyond: bool = False
    rest: Rest = Rest.flush
    ttt: ReadingRule = field(default_factory=ReadingRule)


class Program:
    """Runs a command and keeps what it was given."""

    def __init__(self, **options: object) -> None:
        self.command = Command(
            Keys,
            self.run,
            bounds={"steps": COUNT},
            effects={"rest": (Condition("verify", lambda keys: keys.verify),)},
            old={
                "--eta": "ttt.eta",
                "--beyond=allow": "beyond=true",
                "--beyond=refuse": "beyond=false",
            },
            old_places=("checkpoint",),
            **options,  # type: ignore[arg-type]
        )
        self.keys: Keys | None = None

    def run(self, keys: Keys) -> int:
        self.keys = keys
        return 0

    def of(self, *words: str) -> Keys:
        assert run_command(words, self.command, "About.") == 0
        assert self.keys is not None
        return self.keys


def test_keys_are_typed_and_texts_taken_as_they_are() -> None:
    text = 'What\'s this, {a: 1} ${x}? [1,2]\n"no" 1e3=2'
    keys = Program().of(
        "checkpoint=a b/${c}", f"prompt={text}", "prompt=null", "tokenizer=1e3", "steps=7",
        "share=1e-3", "stop=[1,2]", "verify=true", "rest=drop", "ttt=off", "ttt.eta=2",
    )  # fmt: skip
    assert keys.checkpoint == Path("a b/${c}") and keys.prompt == [text, "null"]
    assert keys.tokenizer == "1e3" and keys.steps == 7 and keys.share == 1e-3
    assert keys.stop == [1, 2] and keys.verify and keys.rest is Rest.drop
    assert keys.ttt.mode is ReadingMode.off and keys.ttt.eta == 2
    again = Program().of("checkpoint=x", "tokenizer=null", "stop=5")
    assert again.tokenizer is None and again.stop == [5] and again.prompt == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "checkpoint=???: must be given: a path"),
        (["checkpoint=x", "step=3"], "step=3: no such key; did you mean steps?"),
        (["checkpoint=x", "steps=0"], "steps=0: must be at least 1"),
        (["checkpoint=x", "steps=many"], "steps=many: must be an integer"),
        (["checkpoint=x", "steps='a"], "steps='a: cannot be read"),
        (["checkpoint=x", "steps=${nope}"], "steps=: "),
        (["checkpoint=x", "hydra.run=3"], "hydra.run=3: no such key"),
        (["checkpoint=x", "rest=dorp"], "rest=dorp: did you mean drop? must be one of flush"),
        (["checkpoint="], "checkpoint=: must not be empty"),
        (["checkpoint=x", "tokenizer=a\nb"], "tokenizer=a b: has characters that do not print"),
        (["checkpoint=x", "prompt"], "prompt=: write KEY=VALUE"),
        (["checkpoint=x", "--eat", "3"], "--eat=: no such option;"),
        (["checkpoint=x", "--eta"], "--eta=: has no value; write ttt.eta=VALUE"),
        (["checkpoint=x", "--beyond", "all"], "--beyond=all: must be one of --beyond=allow, "),
        (["checkpoint=x", "-v"], "-v=: write KEY=VALUE"),
        (["--checkpoint", "x", "--steps", "0"], "steps=0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Program()
    assert run_command(words, program.command, "About.") == 2
    captured = capsys.readouterr()
    assert program.keys is None and captured.out == ""
    assert captured.err.startswith(line) and captured.err.count("\n") == 1, captured.err


@pytest.mark.parametrize("key", [*key_types(Keys), "ttt", "ttt.clip", "steps.x"])
def test_any_value_of_any_key_is_read_or_refused(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in EDGES:
        for words in ([f"{key}={value}"], [f"--{key}", value], [f"+{key}={value}"]):
            program = Program()
            given = [] if key == "checkpoint" else ["checkpoint=x"]
            status = run_command([*given, *words], program.command, None)
            captured = capsys.readouterr()
            lines = [
                n for n in captured.err.splitlines() if not n.startswith(("warning", "notice"))
            ]
            assert status == (2 if program.keys is None else 0)
            assert len(lines) == (status == 2) and captured.out == "", (words, captured.err)


def test_earlier_spellings_work_and_are_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = Program().of(
        "folder", "--prompt", "a b", "--prompt=c", "--steps", "7", "--verify", "--stop", "1", "2",
        "--stop=3", "--eta=0.5", "--beyond", "allow", "--rest", "drop", "ttt=off",
    )  # fmt: skip
    assert (keys.checkpoint, keys.prompt, keys.steps) == (Path("folder"), ["a b", "c"], 7)
    assert keys.verify and keys.beyond and keys.rest is Rest.drop
    assert keys.stop == [1, 2, 3] and keys.ttt.eta == 0.5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: write checkpoint=folder prompt=a b prompt=c steps=7")
    assert line.endswith("--eta, --beyond, --rest)") and "ttt.eta=0.5 beyond=true" in line
    Program().of("checkpoint=folder", "steps=7")
    assert capsys.readouterr().err == ""


def test_a_key_without_effect_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Program().of("checkpoint=x", "rest=drop")
    assert capsys.readouterr().err == "notice: rest has no effect with verify=false\n"


@dataclass
class Files:
    """Read files."""

    inputs: list[Path] = MISSING
    output: str = "out"
    rest: list[str] = field(default_factory=list)


def test_words_without_a_key_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ttt.eta=3.json").touch()
    found: list[Files] = []
    command = Command(Files, lambda keys: found.append(keys) or 0, files="inputs")  # type: ignore[func-returns-value]
    assert run_command(["a", "ttt.eta=3.json", "b/x=1", "output=o"], command, None) == 0
    assert found[0].inputs == [Path("a"), Path("ttt.eta=3.json"), Path("b/x=1")]
    assert run_command(["a", "outptu=o"], command, None) == 2


def test_help_says_what_the_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    program = Program()
    assert run_command(["--help"], {"read": program.command}, "About.") == 0
    assert "read              Read a checkpoint." in capsys.readouterr().out
    assert run_command(["read", "--help"], {"read": program.command}, "About.") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "About."
    (line,) = [line for line in lines if "checkpoint=" in line]
    assert line.split(maxsplit=1) == ["checkpoint=...", "a folder, or a run"]
    assert any(line.split() == ["rest=flush", "flush,", "drop"] for line in lines)
    assert any("ttt.decay=null" in line for line in lines) and program.keys is None
