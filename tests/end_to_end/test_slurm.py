"""The Slurm script passes its arguments on and requeues itself; Slurm's commands are stand-ins."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm" / "pretrain.sbatch"


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with commands that write down how they were called."""
    commands = {
        # the batch script hears of the time limit while srun runs
        "srun": 'printf "%s\\n" "$@" > srun.log\n'
        '[[ -z ${NEAR_LIMIT:-} ]] || kill -USR1 "$PPID"\nsleep 0.2\nexit "${SRUN_STATUS:-0}"',
        "scontrol": 'if [[ $1 == show ]]; then echo node1; echo node2; else echo "$*" >> log; fi',
        "scancel": 'echo "scancel $*" >> log',
    }
    for name, body in commands.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    return tmp_path


def submit(cluster: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script as Slurm would on its first node."""
    slurm = {
        "SLURM_SUBMIT_DIR": str(cluster),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "96",
    }
    path = f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        env={**os.environ, **slurm, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_arguments_are_passed_through_unchanged(cluster: Path) -> None:
    words = ["+model=qwen3_4b", "data.path=[a b,c]", "run.name='two words'"]
    done = submit(cluster, *words)
    assert done.returncode == 0, done.stderr
    called = (cluster / "srun.log").read_text().splitlines()
    assert called[-4:] == ["launch/pretrain.py", *words]
    assert called[called.index("--nnodes") + 1] == "2"
    assert called[called.index("--nproc-per-node") + 1] == "8"
    assert called[called.index("--rdzv-endpoint") + 1] == "node1:24711"
    assert not (cluster / "log").exists(), "nothing to requeue"


def test_a_failure_is_the_status_of_the_job(cluster: Path) -> None:
    assert submit(cluster, "+model=nothing", SRUN_STATUS="2").returncode == 2


def test_the_time_limit_stops_the_trainers_and_requeues(cluster: Path) -> None:
    submit(cluster, "+model=tiny", NEAR_LIMIT="1", SRUN_STATUS="143")
    assert (cluster / "log").read_text().splitlines() == [
        "scancel --signal=TERM 4711.0", "requeue 4711"
    ]  # fmt: skip


def test_the_script_asks_for_what_its_readme_says() -> None:
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    for option in ("--requeue", "--signal=B:USR1@180", "--open-mode=append"):
        assert f"#SBATCH {option}" in options
