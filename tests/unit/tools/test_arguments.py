"""A mistake in the arguments of any program takes one line and exit status 2."""

import importlib
import os
from pathlib import Path

import pytest

from tools import generate

NUMBERS = {
    "benchmark fast-weight-layer": ["--hidden", "--tokens", "--chunk", "--repeats"],
    "benchmark checkpoint": ["--hidden", "--layers", "--repeats"],
    "benchmark scan": ["--ranks", "--state-mb", "--repeats"],
    "benchmark decoding": ["--hidden", "--ffn", "--layers", "--chunk", "--batch", "--rounds"],
    "convert_checkpoint import checkpoint=nowhere output=there": ["seed=", "ttt.layers="],
    "convert_checkpoint export checkpoint=nowhere output=there": ["shard_gib="],
    "generate checkpoint=nowhere prompt=x": [
        "max_new_tokens=", "temperature=", "top_k=", "top_p=", "seed=", "stop_token=",
        "parallel.tp=", "ttt.eta=", "ttt.chunk_size=", "ttt.decay=",
    ],
    "bake checkpoint=nowhere output=there read=x": ["probe_tokens=", "ttt.eta=", "ttt.clip.bound="],
    "preprocess_data nowhere output=there": [
        "eod_id=", "pad_id=", "align=", "workers=", "shard_bytes=",
    ],
    "plan model +model=tiny": ["ranks="],
    "plan scan +model=tiny": ["tflops="],
}  # fmt: skip
EDGES = ["-1", "100000000000000000000", "nan", "x\ny", "", "1e400"]
WORDS = [
    ([], ("the following arguments are required", "must be given")),
    (["--no-such-flag"], ("--help lists the options", "no such option; write KEY=VALUE")),
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # tools/convert_checkpoint.py hides the GPUs when it is imported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def status_of(program: str, words: list[str]) -> int:
    try:
        status: int = importlib.import_module(f"tools.{program}").main(words)
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code
    return status


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command in NUMBERS for flag in NUMBERS[command]]
)
def test_numbers(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = command.split()
    for value in EDGES:
        given = [f"{flag}{value}"] if flag.endswith("=") else [f"{flag}={value}"]
        assert status_of(program, [*words, *given]) == 2, value
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == "", captured.err
        assert len(captured.err) < 600
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("program", ["compare", "plan", "convert_checkpoint", "generate", "bake",
                                     "preprocess_data", "benchmark"])  # fmt: skip
@pytest.mark.parametrize(("words", "expected"), WORDS)
def test_missing_arguments(
    program: str, words: list[str], expected: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = {"plan": "scan", "benchmark": "scan", "convert_checkpoint": "import"}.get(program)
    if command is not None and words:
        words = [command, *words]
    assert status_of(program, words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for line in captured.err.splitlines():  # one a missing key
        assert any(text in line for text in expected), captured.err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "preprocess_data nowhere output=there format=text json_key=k column=c",
            [
                "json_key has no effect with format=text",
                "column has no effect with format=text",
            ],
        ),
        (
            "preprocess_data nowhere output=there pattern=*",
            ["pattern has no effect with inputs=[nowhere]"],
        ),
        ("preprocess_data nowhere output=there json_key=k", []),
        (
            "convert_checkpoint import checkpoint=nowhere output=there dry_run=true verify=true",
            ["verify has no effect with dry_run=true"],
        ),
        (
            "convert_checkpoint export checkpoint=nowhere output=there verify=true shard_gib=2",
            [],
        ),
    ],
)
def test_flags_without_effect_are_named(
    command: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = command.split()
    assert status_of(program, words) == 2  # there is no such folder
    *notices, _ = capsys.readouterr().err.splitlines()
    assert len(notices) == len(flags)
    for notice, flag in zip(notices, flags, strict=True):
        assert notice.startswith(f"notice: {flag}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("top_k=5", ["top_k has no effect with temperature=0.0"]),
        ("temperature=1 seed=2 rest=drop", ["rest has no effect with save_memory=null"]),
        (
            "ttt=off ttt.eta=1 ttt.clip.bound=2",
            [
                "ttt.eta has no effect with ttt.mode=off",
                "ttt.clip.bound has no effect with ttt.mode=off",
            ],
        ),
        ("max_new_tokens=3 ttt.eta=1", []),
    ],
)
def test_what_has_no_effect_on_generation(
    words: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["checkpoint=nowhere", "prompt=x", *words.split()]) == 2
    *notices, _ = capsys.readouterr().err.splitlines()
    assert notices == [f"notice: {line}" for line in expected]
