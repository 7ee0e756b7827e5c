"""Bad input at the command line: one line per fault on stderr, exit status 2, nothing written."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def start(
    folder: Path, *words: str, program: str = "launch/pretrain.py", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program from an empty folder, as a fresh process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / program), *words],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["model=???: choose a model with +model=NAME: llama3_1_8b, micro, qwen3_0_6b,"]),
        (["+model=qwen34b"], ["model=qwen34b: no such model; did you mean qwen3_4b?"]),
        (["+model=tiny", "train.step=5"], ["train.step=5: no such key; did you mean steps?"]),
        (["+model=tiny", "train.steps=many"], ["train.steps=many: must be an integer"]),
        (["+model=tiny", "ttt.layers=[6]"], ["ttt.layers=[6]: tiny has no layer 6"]),
        (
            ["+model=tiny", "parallel.cp=2", "train.seq_length=1000", "ttt.decay=0"],
            ["ttt.decay=0.0: must lie", "nearest valid: 768 or 1024", "world_size=1: parallel.tp"],
        ),
        (["--cfg", "job", "+model=tiny", "train.steps=x"], ["train.steps=x: must be an integer"]),
        (["--multirun", "+model=tiny", "run.name=a,b", "ttt.eta=-1"], ["ttt.eta=-1.0: must"] * 2),
        (
            ["+model=tiny", "model.attention=transformer_engine", "data.reset_attention=false"],
            ["model.attention=transformer_engine: "],
        ),
    ],
)  # fmt: skip
def test_faults(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    done = start(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    printed = done.stderr.splitlines()
    assert len(printed) == len(expected), done.stderr
    for line, fragment in zip(printed, expected, strict=True):
        assert fragment in line
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set() or "--multirun" in words, left  # Hydra keeps its multirun.yaml


def test_an_error_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    begun = time.monotonic()
    done = start(tmp_path, "+model=tiny", "ttt.decay=3", PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (
        2, "ttt.decay=3.0: must lie in (0, 1]; 1 keeps everything\n"
    )  # fmt: skip
    assert time.monotonic() - begun < 10, "importing torch alone takes longer on a busy machine"


def test_only_rank_0_speaks(tmp_path: Path) -> None:
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = start(tmp_path, "+model=tiny", "ttt.decay=3", RANK="1", LOCAL_RANK="1", **torchrun)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("launch/pretrain.py", ["+model=tiny", "ttt.decay=3"]),
        ("tools/evaluate.py", ["task=speed", "checkpoint=nowhere"]),
    ],
)
def test_a_leftover_of_another_launcher_silences_nobody(
    tmp_path: Path, program: str, words: list[str]
) -> None:
    done = start(tmp_path, *words, program=program, RANK="1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == (
        "RANK=1: WORLD_SIZE is not set beside it:"
        " start the processes with torchrun, or unset it"
    )  # fmt: skip


def test_a_run_directory_of_another_configuration(tmp_path: Path) -> None:
    shown = start(tmp_path, "--cfg", "job", "--resolve", "+model=tiny")
    assert shown.returncode == 0, shown.stderr
    run = tmp_path / "outputs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(shown.stdout)
    done = start(tmp_path, "+model=tiny", "train.seed=1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("run.dir=outputs/tiny: holds another configuration (train.seed=1234")
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("launch/pretrain.py", ["+experiment=qwen3_4b_32k", "run.dry_run=true"]),
        ("tools/plan.py", ["model", "+experiment=qwen3_4b_32k"]),
    ],
)
def test_the_dry_run_builds_nothing(tmp_path: Path, program: str, words: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = start(tmp_path, *words, program=program, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "\n  eta: 3.0\n" in done.stdout, "the resolved configuration"
    assert "parameters    total 4,061,866,496, fast 149,422,080, added 39,398,400" in done.stdout
    assert "  cp rank 3   tokens 12,288-16,383, 16,384-20,479" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]


def test_the_plan_of_a_bad_configuration(tmp_path: Path) -> None:
    done = start(tmp_path, "model", "+model=qwen3_4b", "parallel.tp=4", "ranks=6",
                 program="tools/plan.py")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("world_size=6: parallel.tp=4")


def test_help_and_configuration(tmp_path: Path) -> None:
    shown = start(tmp_path, "--help")
    assert shown.returncode == 0
    assert "experiment: demo, evidence_micro" in shown.stdout
    assert "seq_length" in shown.stdout
    config = start(tmp_path, "--cfg", "job", "+model=tiny", "ttt=off", "train.steps=7")
    assert config.returncode == 0
    assert "steps: 7" in config.stdout
    assert "mode: 'off'" in config.stdout, "an unquoted off would read back as false"
    assert list(tmp_path.iterdir()) == []
