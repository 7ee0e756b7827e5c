"""A process's place among the others, or one line that names the variable that is wrong."""

import importlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttt.config.launcher import Launch, LaunchError, launched, one_process
from megatron_ttt.config.load import run_with_config
from megatron_ttt.training.distributed import distributed, local_device
from tests.unit.config.compose import configured

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in TORCHRUN.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        (TORCHRUN, Launch(3, 4, 1)),
        ({"WORLD_SIZE": "1"}, Launch(0, 1, 0)),
        ({"RANK": "0", "LOCAL_RANK": "0"}, Launch(0, 1, 0)),
        ({"MASTER_ADDR": "gone", "MASTER_PORT": "x"}, Launch(0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        ({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "8"}, Launch(3, 4, 1)),
    ],
)
def test_places(environment: dict[str, str], expected: Launch) -> None:
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "1"}, "RANK=1: WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': must be"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='': must be"),
        ({"RANK": "-1"}, "RANK='-1': must be a whole number of at least 0"),
        ({"RANK": "²"}, "RANK='²': must be"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4: must be below WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_RANK": "9" * 50}, f"LOCAL_RANK='{'9' * 40}': must be"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "3"}, "LOCAL_RANK=3: must be below WORLD_SIZE=1"),
        (without("LOCAL_RANK"), "WORLD_SIZE=4: LOCAL_RANK is not set"),
        (without("MASTER_ADDR"), "WORLD_SIZE=4: MASTER_ADDR is not set"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "WORLD_SIZE=4: MASTER_PORT is not set"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT='70000': must be a port"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, "SLURM_STEP_NUM_TASKS=8: srun"),
    ],
)
def test_leftovers(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(LaunchError) as error:
        launched(environment)
    (line,) = str(error.value).splitlines()
    assert line.startswith(expected)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(VARIABLES), st.sampled_from(
    ["", "0", "1", "2", "-1", "1.5", "1e3", " 1", "１", "nan", "x\ny", "9" * 5000]
)))  # fmt: skip
def test_any_environment_gives_a_place_or_one_line(environment: dict[str, str]) -> None:
    try:
        place = launched(environment)
    except LaunchError as error:
        (line,) = str(error).splitlines()
        assert line.split("=")[0] in VARIABLES and len(line) < 300
    else:
        assert 0 <= place.rank < place.world_size > place.local_rank >= 0
        assert place.world_size == 1 or environment["MASTER_ADDR"]


def test_a_machine_with_fewer_gpus_than_processes() -> None:
    assert local_device(1, 2) == 1
    with pytest.raises(LaunchError, match="LOCAL_RANK=2: there are 2 GPUs here"):
        local_device(2, 2)


def test_work_of_one_process() -> None:
    one_process("a cake is baked", {})
    with pytest.raises(LaunchError, match=r"^WORLD_SIZE=4: a cake is baked by one process"):
        one_process("a cake is baked", TORCHRUN)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # tools/convert_checkpoint.py hides the GPUs when it is imported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return monkeypatch


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("generate", ["nowhere", "--prompt", "x"]),
        ("bake", ["nowhere", "baked", "--read", "x"]),
        ("convert_checkpoint", ["import", "nowhere", "there"]),
    ],
)
def test_every_program_names_the_variable(
    environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    program: str,
    words: list[str],
) -> None:
    environment.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    environment.setenv("WORLD_SIZE", "many")
    environment.setenv("RANK", "1")
    main = importlib.import_module(f"tools.{program}").main
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "WORLD_SIZE='many': must be" in line and captured.out == ""


def test_a_rank_that_is_wrong_speaks_though_it_is_not_the_first(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    words = ["+model=tiny", "train.global_batch_size=16"]
    assert run_with_config(lambda config, given: local_device(1, 1), words) == 2
    assert capsys.readouterr().err.startswith("LOCAL_RANK=1: there are 1 GPUs here")


def test_ranks_that_do_not_meet(environment: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        first = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        for name, value in {**first, **place}.items():
            environment.setenv(name, value)
        with (
            pytest.raises(LaunchError) as error,
            distributed(configured("+model=tiny", "parallel.timeout_s=1")),
        ):
            pass
    (line,) = str(error.value).splitlines()
    assert line.startswith("MASTER_ADDR=127.0.0.1: the ranks do not meet there (")
    assert "in use" in line
