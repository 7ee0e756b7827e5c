"""A mistake in the arguments of any program takes one line and exit status 2."""

import importlib
import os
from pathlib import Path

import pytest

from tools import generate

NUMBERS = {
    "benchmark fast-weight-layer": ["hidden=", "tokens=", "chunk=", "repeats="],
    "benchmark checkpoint": ["hidden=", "layers=", "repeats="],
    "benchmark scan": ["ranks=", "state_mb=", "repeats="],
    "benchmark decoding": ["hidden=", "ffn=", "layers=", "chunk=", "batch=", "rounds="],
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
WORDS = [([], "must be given"), (["--no-such-flag"], "no such option; write KEY=VALUE")]
# Each program's earlier spelling, and today's.
OLD = {
    "generate m --prompt x --prompt y --max-new-tokens=3 --stop-token 1 --stop-token 2 ttt=off":
        "checkpoint=m prompt=x prompt=y max_new_tokens=3 ttt=off stop_token=[1,2]",
    "generate --session s ttt.eta=2 m --beyond-positions allow --special-tokens tokens":
        "session=s ttt.eta=2 checkpoint=m beyond_positions=true special_tokens=tokens",
    "bake m d --read x --probe-tokens 20 --bos=none --beyond-positions refuse":
        "checkpoint=m output=d read=x probe_tokens=20 bos=none beyond_positions=false",
    "convert_checkpoint import m d --ttt-layers 0,6 --ttt-chunk 16 --ttt-eta 0.5 --verify":
        "checkpoint=m output=d ttt.chunk_size=16 ttt.eta=0.5 verify=true ttt.layers=[0,6]",
    "convert_checkpoint import m d --ttt-layers none --dry-run":
        "checkpoint=m output=d dry_run=true ttt.layers=[]",
    "convert_checkpoint export m d --shard-gib 2 --style=reference --dtype bf16 --tokenizer t":
        "checkpoint=m output=d shard_gib=2 style=reference dtype=bf16 tokenizer=t",
    "preprocess_data a b --output p --json-key k --workers 2 --overwrite --on-error stop":
        "a b output=p json_key=k workers=2 overwrite=true on_error=stop",
    "plan model +model=tiny --ranks 2": "+model=tiny ranks=2",
    "plan scan +model=tiny --tflops 4 --plot a.png": "+model=tiny tflops=4 plot=a.png",
    "compare a.json b.json --output o": "a.json b.json output=o",
    "benchmark decoding --batch 1 4 --hidden 64 --json f": "hidden=64 output=f batch=[1,4]",
    "benchmark scan --state-mb 2 --write-constants f": "state_mb=2 write_constants=f",
    "benchmark counted-step --documents 2 ttt=off": "documents=2 ttt=off",
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # tools/convert_checkpoint.py hides the GPUs when it is imported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def status_of(program: str, words: list[str]) -> int:
    status: int = importlib.import_module(f"tools.{program}").main(words)
    return status


@pytest.mark.parametrize("command", OLD)
def test_earlier_spellings(command: str) -> None:
    """What a program accepts until the next release is what it takes today."""
    program, *words = command.split()
    module = importlib.import_module(f"tools.{program}")
    known = module.COMMANDS[words.pop(0)] if hasattr(module, "COMMANDS") else module.COMMAND
    today, warning = known.modern(words)
    assert today == OLD[command].split()
    assert warning.startswith("warning: write ")
    assert known.modern(today) == (today, "")


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command in NUMBERS for flag in NUMBERS[command]]
)
def test_numbers(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = command.split()
    for value in EDGES:
        assert status_of(program, [*words, f"{flag}{value}"]) == 2, value
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == "", captured.err
        assert len(captured.err) < 600
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("program", ["compare", "plan", "convert_checkpoint", "generate", "bake",
                                     "preprocess_data", "benchmark"])  # fmt: skip
@pytest.mark.parametrize(("words", "expected"), WORDS)
def test_missing_arguments(
    program: str, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = {"plan": "scan", "benchmark": "scan", "convert_checkpoint": "import"}.get(program)
    if command is not None and words:
        words = [command, *words]
    assert status_of(program, words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for line in captured.err.splitlines():  # one a missing key
        assert expected in line


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
