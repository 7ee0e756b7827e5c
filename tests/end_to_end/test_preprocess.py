"""The preprocessing program as a user starts it: its words, its exit codes, and being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
SHARDS_BEFORE_KILL = 5


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def outputs(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".meta.json")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 documents, one damaged."""
    path = tmp_path_factory.mktemp("corpus") / "x.jsonl"
    lines = [json.dumps({"text": f"document {i} " + "words " * (i % 23)}) for i in range(4000)]
    lines[1234] = lines[1234][:-3]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    """The result of an undisturbed run."""
    prefix = corpus.parent / "whole"
    finished = run(corpus, f"output={prefix}")
    assert finished.returncode == 0, finished.stderr
    return prefix


def test_the_summary(corpus: Path, whole: Path) -> None:
    again = run(corpus, f"output={whole}", "overwrite=true")
    sidecar = json.loads(Path(f"{whole}.meta.json").read_text())
    assert again.returncode == 0
    assert "documents   3,999; skipped 1 (1 bad_json)" in again.stdout
    assert f"tokens      {sidecar['tokens']:,}, of which 0 padding; largest id 256 of 258" in (
        again.stdout
    )
    assert f"longest     {sidecar['longest_document_tokens']:,} tokens: {corpus}:" in again.stdout
    assert f"skipped     {corpus}:1235 bad_json" in again.stdout
    assert "M tokens/s" in again.stdout


def start_and_wait_for_shards(corpus: Path, prefix: Path) -> subprocess.Popen[str]:
    """A running job of about 400 shards that has finished a few."""
    arguments = [str(corpus), f"output={prefix}", "workers=2", "shard_bytes=900"]
    running = subprocess.Popen(
        [*PROGRAM, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    reports = Path(f"{prefix}.partial")
    deadline = time.monotonic() + 30
    while len(list(reports.glob("shard-*.json"))) < SHARDS_BEFORE_KILL:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return running


def test_killed_in_the_middle_and_started_again(corpus: Path, whole: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    running = start_and_wait_for_shards(corpus, prefix)
    workers = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=30)
    assert not any(Path(f"{prefix}{suffix}").exists() for suffix in (".bin", ".idx", ".meta.json"))
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []  # workers do not outlive the program
    done = len(list(Path(f"{prefix}.partial").glob("shard-*.json")))
    assert done >= SHARDS_BEFORE_KILL
    again = run(corpus, f"output={prefix}", "shard_bytes=900")
    assert again.returncode == 0, again.stderr
    assert f"shards, {done} of them done before" in again.stdout
    assert outputs(prefix) == outputs(whole)


def test_a_killed_worker_ends_the_job_and_keeps_its_part(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "out"
    running = start_and_wait_for_shards(corpus, prefix)
    spawned = [
        child
        for child in psutil.Process(running.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    os.kill(spawned[0].pid, signal.SIGKILL)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "a worker was killed" in errors
    assert "start again to continue" in errors
    again = run(corpus, f"output={prefix}", "shard_bytes=900")
    assert again.returncode == 0, again.stderr
    assert outputs(prefix) == outputs(whole)


def test_interrupted_from_the_keyboard(corpus: Path, whole: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    running = start_and_wait_for_shards(corpus, prefix)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors == (
        f"interrupted; the finished part is kept in {prefix}.partial: start again to continue\n"
    )
    again = run(corpus, f"output={prefix}", "shard_bytes=900")
    assert again.returncode == 0, again.stderr
    assert outputs(prefix) == outputs(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "input nowhere.jsonl does not exist"),
        (["{corpus}", "align=-3"], "align=-3"),
        (["{corpus}", "align=many"], "align=many: must be an integer"),
        (
            ["{corpus}", "format=xml"],
            "format=xml: must be one of auto, text, lines, jsonl",
        ),
        (["{corpus}", "tokenizer={folder}"], "cannot be loaded"),
        (["{corpus}", "on_error=stop"], "x.jsonl:1235 bad_json (on_error=stop)"),
        (["{corpus}", "json_key=body"], "the inputs hold no usable document"),
        (["{corpus}", "format=parquet"], "is not a readable Parquet file"),
    ],
)
def test_mistakes_take_one_line_and_exit_2(
    corpus: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(corpus=corpus, folder=tmp_path) for argument in arguments]
    failed = run(*filled, f"output={tmp_path / 'out'}")
    assert failed.returncode == 2
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
    assert list(tmp_path.iterdir()) == []
