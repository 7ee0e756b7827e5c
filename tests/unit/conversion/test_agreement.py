"""What a run may change of the checkpoint it starts from: by choice and with a line, or not."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import Config, TTTConfig, TTTMode
from megatron_ttt.conversion.agreement import rule_notices
from megatron_ttt.conversion.importing import IMPORTED_FROM, ORIGIN
from megatron_ttt.conversion.manifest import check_start
from megatron_ttt.rule import Clip, ClipMode, Conv, Normalize
from tests.unit.config.compose import configured

TRAINED = TTTConfig(layers=[0, 6], eta=3.0, chunk_size=4096)
CHANGES: dict[str, TTTConfig] = {
    "ttt.eta": replace(TRAINED, eta=0.3),
    "ttt.chunk_size": replace(TRAINED, chunk_size=64),
    "ttt.decay": replace(TRAINED, decay=0.9),
    "ttt.normalize": replace(TRAINED, normalize=Normalize.key_energy),
    "ttt.layers": replace(TRAINED, layers=[0]),
    "ttt.conv": replace(TRAINED, conv=Conv.off),
    "ttt.proj": replace(TRAINED, proj=False),
}


def compared(rule: TTTConfig, *given: str, trained: TTTConfig = TRAINED) -> list[str]:
    return rule_notices(rule, trained, layers=12, given=given, where="here")


@pytest.mark.parametrize("key", CHANGES)
def test_a_default_that_differs_is_a_fault_and_an_override_a_choice(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        compared(CHANGES[key], "train.steps")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key}=") and f"(here); give {key}=" in line
    (notice,) = compared(CHANGES[key], key)
    assert notice.startswith(f"notice: {key}=") and "the checkpoint was trained with" in notice


def test_the_sentences_name_both_values() -> None:
    with pytest.raises(ConfigError) as error:
        compared(replace(TRAINED, eta=0.3))
    assert str(error.value) == (
        "ttt.eta=0.3: the checkpoint was trained with 3.0 (here); give ttt.eta=3.0, or ttt.eta=0.3"
        " to change the update rule"
    )
    clipped = replace(TRAINED, clip=Clip(ClipMode.relative, 0.1))
    assert compared(clipped, "ttt.clip") == [
        "notice: ttt.clip.mode=relative, the checkpoint was trained with off (here)",
        "notice: ttt.clip.bound=0.1, the checkpoint was trained with null (here)",
    ]


def test_what_means_the_same_is_the_same() -> None:
    assert compared(replace(TRAINED, layers=None)) == []  # every sixth of twelve
    assert compared(replace(TRAINED, clip=Clip(ClipMode.off, 5.0))) == []
    assert compared(replace(CHANGES["ttt.eta"], mode=TTTMode.off)) == []  # the baseline
    assert compared(TRAINED, trained=TTTConfig(mode=TTTMode.off)) == []


def facts_of(config: Config, **more: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {"config": plain, **more}


def test_a_window_over_full_attention_is_a_choice(tmp_path: Path) -> None:
    trained = configured("+model=qwen3_4b")
    windowed = configured("+model=qwen3_4b", "model.sliding_window=4096")
    key = "model.sliding_window"
    for facts in (facts_of(trained), facts_of(trained, **{IMPORTED_FROM: "x"})):
        assert check_start(facts, trained, tmp_path, given=()) == []
        with pytest.raises(ConfigError, match=r"^model\.sliding_window=4096: the checkpoint has"):
            check_start(facts, windowed, tmp_path, given=())
        (notice,) = check_start(facts, windowed, tmp_path, given={key})
        assert notice.startswith(f"notice: {key}=4096, the checkpoint has sliding_window=None")


def test_nothing_else_of_a_published_model_is_a_choice(tmp_path: Path) -> None:
    trained = configured("+model=qwen3_4b")
    other = configured("+model=qwen3_4b", "model.rope.base=1e4")
    given = {"model.rope.base"}
    (notice,) = check_start(facts_of(trained), other, tmp_path, given=given)
    assert notice.startswith("notice: model.rope.base=10000.0, the checkpoint has rope_theta")
    with pytest.raises(ConfigError, match=r"^model\.rope\.base=10000"):
        check_start(facts_of(trained, **{IMPORTED_FROM: "x"}), other, tmp_path, given=given)


@pytest.mark.parametrize("trained_before", [True, False])
def test_an_import_has_a_rule_if_its_source_was_trained_with_one(
    tmp_path: Path, trained_before: bool
) -> None:
    """A plain model's target generators are new: a recipe's eta is the first they meet."""
    imported, recipe = configured("+model=qwen3_4b"), configured("+experiment=qwen3_4b_32k")
    assert asdict(imported.ttt) != asdict(recipe.ttt)
    (tmp_path / ORIGIN).mkdir()
    source = {"ttt_mode": True} if trained_before else {}
    (tmp_path / ORIGIN / "config.json").write_text(json.dumps(source))
    facts = facts_of(imported, **{IMPORTED_FROM: "x"})
    if not trained_before:
        assert check_start(facts, recipe, tmp_path, given=()) == []
        return
    with pytest.raises(ConfigError, match=r"ttt\.chunk_size=4096: the checkpoint was trained wi"):
        check_start(facts, recipe, tmp_path, given=())
