"""A named checkpoint is found in whatever way it is named."""

from pathlib import Path

import pytest

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.conversion.opened import open_checkpoint

FILES = Path(__file__).resolve().parents[2] / "formats" / "files"


def test_a_runs_folder_its_latest_and_its_checkpoint_are_one() -> None:
    run = FILES / "checkpoints" / "megatron_core_0_16" / "run"
    latest = run / "checkpoints" / "latest"
    found = [open_checkpoint(name) for name in (run, str(run), latest)]
    found.append(open_checkpoint(found[0].path))
    assert len({checkpoint.path for checkpoint in found}) == 1
    for checkpoint in found:
        assert checkpoint.is_megatron and checkpoint.run == run and checkpoint.name == run.name
        assert checkpoint.ttt.mode is TTTMode.in_place
        assert checkpoint.trained["train"]["seq_length"] == 64
        assert checkpoint.tokenizer().open(None) is not None


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_an_exported_model(prefix: str) -> None:
    folder = FILES / "exported" / "qwen3_package"
    checkpoint = open_checkpoint(f"{prefix}{folder}")
    assert not checkpoint.is_megatron and checkpoint.run is None
    assert checkpoint.path == folder and checkpoint.trained == {}
    assert checkpoint.ttt.mode is TTTMode.in_place and checkpoint.model.layers > 0


def test_what_is_neither_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"neither metadata\.json \(Megatron.s\) nor config\.json"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        open_checkpoint(f"hf:{tmp_path}")
