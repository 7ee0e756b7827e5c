"""What is in the way of a run is found when it starts, not at its first save."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.training.run_folder import check_places
from tests.unit.config.compose import configured


def check(folder: Path) -> None:
    words = ["logging.tensorboard=true", "logging.sample_ids=true", "logging.plot=true"]
    check_places(configured("+model=tiny", f"run.dir={folder}", *words))


def write(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")


def link_to_nothing(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(path.parent / "nothing")


OBSTACLES: list[tuple[str, Callable[[Path], None], str]] = [
    ("checkpoints", write, "is not a folder"),
    ("checkpoints", link_to_nothing, "is not a folder"),
    ("tensorboard", write, "is not a folder"),
    ("tensorboard", link_to_nothing, "is not a folder"),
    *((name, Path.mkdir, "is not a file") for name in ("config.yaml", "metrics.jsonl", "loss.png")),
    ("samples.jsonl", Path.mkdir, "is not a file"),
    ("metrics.jsonl", link_to_nothing, "is not a file"),
    ("checkpoints/latest", lambda path: path.mkdir(parents=True), "is not a file"),
    ("checkpoints/latest", link_to_nothing, "is not a file"),
    ("checkpoints/latest.partial", lambda path: path.mkdir(parents=True), "is not a file"),
]


@pytest.mark.parametrize(("name", "put", "message"), OBSTACLES)
def test_an_obstacle_is_one_line(
    tmp_path: Path, name: str, put: Callable[[Path], None], message: str
) -> None:
    put(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        check(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"run.dir={tmp_path}: {tmp_path / name} {message}")


def test_a_folder_that_a_run_left_is_fine(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints/latest"):
        write(tmp_path / name)
    (tmp_path / "checkpoints" / "step_00000005").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    check(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
