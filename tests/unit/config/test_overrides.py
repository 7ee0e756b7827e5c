"""Each wrong word of a command line gives one line that names it and says what would be right."""

import pytest

from megatron_ttt.config.faults import ConfigError, Fault, show, suggest
from megatron_ttt.config.load import CONFIG_DIR, from_yaml, load_config
from megatron_ttt.config.overrides import check_overrides, group_options
from megatron_ttt.scan_words import SequenceOrder


def lines(*words: str) -> list[str]:
    """The lines that a user would read."""
    with pytest.raises(ConfigError) as error:
        load_config(words)
    printed = str(error.value).splitlines()
    assert len(printed) == len(error.value.faults), "one line per fault"
    return printed


def test_no_model_lists_the_choices() -> None:
    (line,) = lines("train.steps=5")
    assert line.startswith("model=???: choose a model with +model=NAME: llama3_1_8b, ")
    for name in ("tiny", "qwen3_14b", "scratch_1_5b", "qwen3_4b_128k_yarn"):
        assert name in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["+model=qwen3_4"], ["model=qwen3_4: no such model; did you mean qwen3_4b? choose"]),
        (["model=tiny"], ["model=tiny: write +model=tiny"]),
        (
            ["experiment=x"],
            ["experiment=x: no such experiment; choose one of demo, evidence_micro, "],
        ),
        (["+experiment=qwen3_4b_32k", "+model=tiny"], ["write model=tiny"]),
        (["+model=tiny", "ttt=on"], ["ttt=on: no such ttt; choose one of in_place, off"]),
        (["+model=tiny", "+ttt=off"], ["+ttt=off: has a default already; write ttt=off"]),
        (["+model=tiny", "ttt.layer=[1]"], ["did you mean layers? ttt has mode, layers,"]),
        (["+model=tiny", "trian.steps=1"], ["trian.steps=1: no such key; did you mean train?"]),
        (["+model=tiny", "train.steps.x=1"], ["train.steps.x=1: no such key"]),
        (["+model=tiny", "ttt.clip.mod=1"], ["did you mean mode? ttt.clip has mode, bound"]),
        (["+model=tiny", "train.steps=ten"], ["train.steps=ten: must be an integer"]),
        (["+model=tiny", "train.steps=null"], ["train.steps=null: must be an integer"]),
        (["+model=tiny", "train.steps=1.5"], ["train.steps=1.5: must be an integer"]),
        (["+model=tiny", "optimizer.lr=fast"], ["optimizer.lr=fast: must be a number"]),
        (["+model=tiny", "ttt.conv=maybe"], ["ttt.conv=maybe: must be one of learned, next_token"]),
        (["+model=tiny", "ttt.layers=[a]"], ["must be a list of integers, or null"]),
        (["+model=tiny", "ttt.layers=3"], ["ttt.layers=3: must be a list of integers, or null"]),
        (
            ["+model=tiny", "parallel.cp_order=zigzig"],
            ["parallel.cp_order=zigzig: did you mean zigzag? must be one of zigzag, contiguous"],
        ),
        (["+model=tiny", "parallel.scan=fast"], ["one of auto, all_gather, all_to_all, doubling"]),
        (["+model=tiny", "ttt.clip.mode=on"], ["must be one of off, relative, absolute"]),
        (["+model=tiny", "+train.steps=4"], ["the key exists; write train.steps=4"]),
        (["+model=tiny", "~train.steps"], ["keys cannot be removed"]),
        (["+model=tiny", "train.steps=1,2"], ["a list is written [1,2], a sweep needs"]),
        (["+model=tiny", "train.steps"], ["train.steps=: cannot be read; write key=value"]),
        (["+model=tiny", "run.name=${nowhere.x}"], ["Interpolation key 'nowhere.x' not found"]),
        (
            ["+model=tinny", "train.stepz=3", "optimizer.lr=x", "parallel.tp=2"],
            ["did you mean tiny?", "did you mean steps?", "optimizer.lr=x: must be a number"],
        ),
    ],
)  # fmt: skip
def test_wrong_words(words: list[str], expected: list[str]) -> None:
    printed = lines(*words)
    assert len(printed) == len(expected), printed
    for line, fragment in zip(printed, expected, strict=True):
        assert fragment in line


def test_sweeps_are_values_when_asked_for() -> None:
    words = ["+model=tiny", "train.steps=1,2", "ttt=in_place,off", "+ablation=glob(*)"]
    assert check_overrides(words, group_options(CONFIG_DIR), sweep=True) == []
    assert len(check_overrides(words, group_options(CONFIG_DIR))) == 3


def test_a_saved_configuration_that_does_not_fit() -> None:
    with pytest.raises(ConfigError) as error:
        from_yaml("train:\n  stepz: 3\n")
    assert "stepz" in str(error.value)


def test_values_are_shown_as_typed() -> None:
    assert show([1, None, True, SequenceOrder.zigzag, "a"]) == "[1,null,true,zigzag,a]"
    assert Fault("k", None, "a\n b").line() == "k=null: a b"
    assert suggest("hello", ["world"]) == ""
