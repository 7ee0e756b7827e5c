"""A checkpoint named as the model: the words that it becomes, and what Hydra makes of them."""

from pathlib import Path

import pytest

from launch.pretrain import look
from launch.pretrain import main as pretrain
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.load import load_config
from megatron_ttt.config.schema import TokenizerKind
from megatron_ttt.conversion.model_words import spelled_out
from megatron_ttt.conversion.opened import open_checkpoint
from tests.unit.conversion.folders import QWEN3, import_folder, write_hf

FILES = Path(__file__).resolve().parents[2] / "formats" / "files"
RUN = FILES / "checkpoints" / "megatron_core_0_16" / "run"
EXPORTED = FILES / "exported" / "qwen3_package"
DATA = "data.path=corpus"


def whole(words: list[str]) -> list[str]:
    """The command line that Hydra gets."""
    said, rest = spelled_out(words)
    return [*said, *rest]


@pytest.mark.parametrize("named", [str(RUN), f"hf:{EXPORTED}", str(EXPORTED)])
def test_the_model_and_its_rule_are_the_checkpoints(named: str) -> None:
    checkpoint = open_checkpoint(named)
    config = load_config(whole([f"+model={named}", DATA]))
    assert config.model == checkpoint.model
    assert config.ttt == checkpoint.ttt
    scheme = "" if named == str(RUN) else "hf:"
    assert config.checkpoint.load == f"{scheme}{checkpoint.path}"
    assert look(config, set()) == []


def test_a_run_over_bytes_says_so() -> None:
    config = load_config(whole([f"+model={RUN}", DATA]))
    assert config.data.tokenizer.kind is TokenizerKind.bytes


def test_what_the_user_gives_holds() -> None:
    words = [DATA, f"+model={RUN}", "ttt=off", "model.sliding_window=9", "checkpoint.load=null"]
    words += ["data.tokenizer.name=mine"]
    found = whole(words)
    assert [word for word in found if word in words] == [word for word in words if word != words[1]]
    assert not [word for word in found if word.startswith("ttt.")]
    config = load_config(found)
    assert (config.model.sliding_window, config.checkpoint.load) == (9, None)
    assert config.data.tokenizer.kind is TokenizerKind.huggingface


def test_a_plain_checkpoint_has_no_rule_and_odd_names_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "it's a model, v1.0=x"
    write_hf(folder, QWEN3)
    config = load_config(whole([f"+model=hf:{folder}", DATA, "run.name=mine"]))
    assert config.model.name == folder.name
    assert config.checkpoint.load == f"hf:{folder}"
    assert config.data.tokenizer.name == str(folder)
    imported = tmp_path / "imported"
    import_folder(folder, imported)
    words = whole([f"+model={imported}", DATA, "run.name=mine"])
    assert not [word for word in words if word.startswith("ttt.")]
    assert load_config(words).model.layers == config.model.layers


def test_what_a_recipe_says_of_its_own_model_does_not_stay() -> None:
    words = ["+experiment=qwen3_4b_32k", f"model=hf:{EXPORTED}", DATA, "train.seq_length=64"]
    checkpoint = open_checkpoint(f"hf:{EXPORTED}")
    config = load_config(whole(words))
    assert (config.model, config.ttt) == (checkpoint.model, checkpoint.ttt)


def test_what_the_checkpoint_says_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    """No notices about its keys, and no choice of the user's in them where weights are others'."""
    dry = ["data=python_stdlib", "run.dry_run=true", "train.seq_length=64"]
    assert pretrain([f"+model={RUN}", *dry, "parallel.scan=ring"]) == 0
    (notice,) = capsys.readouterr().err.splitlines()
    assert notice == "notice: parallel.scan has no effect with parallel.cp=1"
    other = EXPORTED.with_name("llama_package")
    assert pretrain([f"+model={RUN}", *dry, f"checkpoint.load=hf:{other}"]) == 2
    assert "the checkpoint has" in capsys.readouterr().err


def test_names_of_files_stay_as_they_are() -> None:
    words = ["+model=tiny", "data.path=a/b", "train.steps=3"]
    assert spelled_out(words) == ([], words)


def test_a_folder_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^\+model=hf:.*gone: is not a folder$"):
        spelled_out([f"+model=hf:{tmp_path / 'gone'}"])
    assert pretrain([f"+model=hf:{tmp_path / 'gone'}", DATA]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_dry_run_compares_as_the_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Model and update rule of both formats; nothing is loaded."""
    dry = ["data=python_stdlib", "run.dry_run=true", "ttt.eta=0.01", "train.seq_length=64"]
    for named in (str(RUN), f"hf:{EXPORTED}"):
        assert pretrain([f"+model={named}", *dry]) == 0
        said = capsys.readouterr().err
        assert "notice: ttt.eta=0.01, the checkpoint was trained with" in said
        assert pretrain(["+model=tiny", f"checkpoint.load={_load(named)}", *dry]) == 2
        said = capsys.readouterr().err
        assert "model.hidden_size=256: the checkpoint has hidden_size=" in said


def _load(named: str) -> str:
    """Return what checkpoint.load takes: no run, but one of its checkpoints."""
    return named if named.startswith("hf:") else str(open_checkpoint(named).path)
