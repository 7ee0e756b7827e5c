"""A run directory belongs to one configuration; only how and where it runs may change."""

from pathlib import Path

import pytest

from megatron_ttt.config.load import to_yaml
from megatron_ttt.config.run_directory import CONFIG_FILE, changed_keys, run_directory_faults
from tests.unit.config.compose import configured


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a started run."""
    config = configured("+model=tiny", f"run.dir={tmp_path}")
    (tmp_path / CONFIG_FILE).write_text(to_yaml(config))
    return tmp_path


def lines(run: Path, *words: str) -> list[str]:
    """Lines of the faults of starting again in that directory."""
    config = configured("+model=tiny", f"run.dir={run}", *words)
    return [fault.line() for fault in run_directory_faults(config)]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run.resume=never", "run.deterministic=true"],
        ["parallel.tp=2", "parallel.cp=2", "parallel.cp_order=contiguous"],
        ["train.steps=999", "train.micro_batch_size=1", "train.recompute=full"],
        ["checkpoint.interval=7", "validation.interval=null", "logging.wandb=offline"],
        ["data.workers=0", "data.cache_dir=elsewhere"],
    ],
)
def test_what_may_change(run: Path, words: list[str]) -> None:
    assert lines(run, *words) == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optimizer.lr=0.5", "optimizer.lr=0.002 there and 0.5 here"),
        ("ttt=off", "ttt.mode=in_place there and off here"),
        ("ttt.layers=[1]", "ttt.layers=[1,3,5] there and [1] here"),
        ("train.seed=5", "train.seed=1234 there and 5 here"),
        ("train.global_batch_size=8", "train.global_batch_size=4 there and 8 here"),
        ("model.hidden_size=512", "model.hidden_size=256 there and 512 here"),
        ("data.path={a: 1}", "data.path.a=1 here"),
        ("train.precision=bf16", "train.precision=auto there and bf16 here"),
    ],
)
def test_what_may_not_change(run: Path, word: str, expected: str) -> None:
    (line,) = lines(run, word)
    assert line.startswith(f"run.dir={run}: holds another configuration (")
    assert expected.replace("=1 here", "") in line
    assert line.endswith("choose another run.dir or run.name")


def test_every_difference_is_named(run: Path) -> None:
    (line,) = lines(run, "optimizer.lr=0.5", "train.seed=5", "train.steps=9")
    assert "optimizer.lr=" in line and "train.seed=" in line
    assert "train.steps" not in line


def test_a_new_directory_and_one_without_configuration(tmp_path: Path) -> None:
    assert lines(tmp_path / "new") == []
    (tmp_path / "notes.txt").write_text("mine")
    assert lines(tmp_path) == []


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"just text", b""])
def test_a_damaged_configuration_is_a_fault(run: Path, content: bytes) -> None:
    (run / CONFIG_FILE).write_bytes(content)
    (line,) = lines(run)
    assert "cannot be read" in line or "holds another configuration" in line


def test_keys_present_on_one_side_only() -> None:
    assert changed_keys({"a": {"b": 1}, "run": {"x": 1}}, {"a": {"c": None}}) == ["a.b"]
    assert changed_keys({"parallelism": 1}, {}) == ["parallelism"], "a prefix is a whole word"


def test_a_configuration_of_before_there_were_words_for_the_convolution(run: Path) -> None:
    file = run / CONFIG_FILE
    text = file.read_text()
    assert "conv: learned" in text
    file.write_text(text.replace("conv: learned", "conv: true"))
    assert run_directory_faults(configured("+model=tiny", f"run.dir={run}")) == []
    file.write_text(text.replace("conv: learned", "conv: false"))
    (fault,) = run_directory_faults(configured("+model=tiny", f"run.dir={run}"))
    assert "ttt.conv=off there and learned here" in fault.message
