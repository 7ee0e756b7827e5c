"""Every warning comes when it should, alone, and not otherwise."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_ttt.evaluation.health_advice import (
    CONCERNS,
    Health,
    LayerHealth,
    plain_values,
    warnings_of,
)
from megatron_ttt.rule import (
    Clip,
    ClipMode,
    Conv,
    Normalize,
    UpdateRule,
    WriteKind,
    WriteSettings,
)

NAN, INF = float("nan"), float("inf")
LAYER = LayerHealth(
    layer=6,
    update_ratio=[0.08, 0.11, 0.13, 0.15],
    output_ratio=[0.1, 0.12, 0.13, 0.15],
    effective_rank=[12.0, 14.0, 15.0, 16.0],
    mean_key_share=[0.2, 0.1, 0.2, 0.1],
    largest_rank=128,
    gradient_shares={"conv": 0.05, "proj": 0.04, "W0": 0.02},
)
HEALTHY = Health(
    length=4096,
    rows=8,
    positions=[1024, 2048, 3072, 4032],
    loss_on=2.0,
    loss_off=2.1,
    gradient_norm=0.7,
    layers=[replace(LAYER, layer=0), LAYER],
)


def with_layer(health: Health = HEALTHY, **changes: Any) -> Health:
    """``HEALTHY`` with its second layer changed."""
    return replace(health, layers=[health.layers[0], replace(LAYER, **changes)])


RULE = UpdateRule()  # no decay, no clip
NO_GAIN = replace(HEALTHY, loss_off=HEALTHY.loss_on)
GROWS = {"update_ratio": [0.2, 0.4, 0.6, 0.79]}
DROWNED = {"update_ratio": [0.5, 0.6, 0.65, 0.7]}


def test_the_healthy_are_left_alone() -> None:
    assert warnings_of(HEALTHY, RULE) == []
    assert warnings_of(NO_GAIN, RULE) == []


CASES = [
    (replace(HEALTHY, loss_on=2.2), "on minus off", "0.1", "ttt.decay=0.9"),
    (replace(HEALTHY, loss_on=NAN), "on minus off", "nan", "Lower ttt.eta"),
    (with_layer(NO_GAIN, **DROWNED), "update ratio above", "layer 6 0.7", "ttt.clip.bound=0.1"),
    (with_layer(update_ratio=[0.0] * 4), "update ratio below", "layer 6 0", "Train"),
    (with_layer(output_ratio=[NAN, 0.001, 0.002, 0.003]), "output ratio", "0.003", "Raise"),
    (with_layer(**GROWS), "growth", "layer 6 2", "ttt.decay=0.9"),
    (with_layer(mean_key_share=[0.9, 0.8, NAN, 0.85]), "mean-key", "layer 6 0.85", "ttt.layers"),
    (with_layer(effective_rank=[1.1, 1.2, 1.1, 1.3]), "effective rank", "1.3", "ttt.layers"),
    (with_layer(gradient_shares={"conv": 0.8}), "share of conv in", "layer 6 0.8", "clip_grad"),
    (
        with_layer(gradient_shares={"conv": 0.0, "proj": 0.0, "W0": 0.1}),
        "share of conv and proj",
        "layer 6 0",
        "diagonal",
    ),
]


@pytest.mark.parametrize(("health", "names", "place", "advice"), CASES)
def test_each_illness_is_named_with_its_place_and_advice(
    health: Health, names: str, place: str, advice: str
) -> None:
    (warning,) = warnings_of(health, RULE)
    assert names in warning and place in warning and advice in warning
    assert "layer 0" not in warning and "\n" not in warning


@pytest.mark.parametrize(
    "health",
    [
        with_layer(**DROWNED),  # gains: learnt to live with it
        replace(HEALTHY, loss_on=HEALTHY.loss_off),  # no gain, but small updates
        with_layer(NO_GAIN, update_ratio=[0.1, 0.2, 0.25, 0.29]),
        with_layer(update_ratio=[0.05, 0.1, 0.15, 0.2]),  # grows, but small yet
        with_layer(update_ratio=[0.4, 0.56, 0.69, 0.8]),  # as unrelated writes do
        with_layer(output_ratio=[0.001, 0.002, 0.02, 0.03]),
        with_layer(mean_key_share=[0.9, 0.2, 0.2, 0.2]),
        with_layer(gradient_shares={"W0": 0.1}),  # conv and projection switched off
        with_layer(gradient_shares={"conv": 0.0, "proj": 0.1}),
    ],
)
def test_what_looks_like_an_illness_is_none(health: Health) -> None:
    assert warnings_of(health, RULE) == []


TRIED = UpdateRule(
    eta=0.5, decay=0.9, clip=Clip(ClipMode.relative, 0.1), normalize=Normalize.key_energy
)


@pytest.mark.parametrize(
    ("rule", "said", "not_said"),
    [
        (TRIED, ["ttt.eta (it is 0.5)", "ttt.decay=0.81 (it is 0.9)"], ["0.9 ", "normalize"]),
        (TRIED, ["ttt.clip.bound=0.05 (it is 0.1)"], ["ttt.clip.mode"]),
        (replace(TRIED, decay=0.99), ["ttt.decay=0.9 (it is 0.99)"], []),
        (replace(TRIED, decay=0.5), ["ttt.decay=0.25 (it is 0.5)"], ["ttt.decay=0.9"]),
        (
            replace(TRIED, clip=Clip(ClipMode.relative, 0.3)),
            ["ttt.clip.bound=0.1 (it is 0.3)"],
            ["ttt.clip.mode"],
        ),
        (
            replace(TRIED, clip=Clip(ClipMode.absolute, 0.01)),
            ["ttt.clip.bound=0.005 (it is 0.01)"],
            ["ttt.clip.mode"],
        ),
        (RULE, ["ttt.decay=0.9", "relative ttt.clip.bound=0.1", "ttt.normalize=key_energy"], []),
    ],
)
def test_advice_is_not_the_value_in_use(
    rule: UpdateRule, said: list[str], not_said: list[str]
) -> None:
    (warning,) = warnings_of(replace(HEALTHY, loss_on=2.2), rule)
    assert all(text in warning for text in said), warning
    assert not any(text in warning for text in not_said), warning


def test_no_concern_advises_a_value_in_use() -> None:
    """Every assignment that is advised differs from the rule; what is raised can be raised."""
    in_use = {"ttt.decay": 0.9, "ttt.clip.bound": 0.1, "ttt.clip.mode": "relative"}
    for health, *_ in CASES:
        for warning in warnings_of(health, TRIED):
            for key, value in re.findall(r"(ttt[.\w]*)=([\w.]*\w)", warning):
                assert str(in_use[key]) != value, warning
        (warning,) = warnings_of(health, RULE)
        raised = re.findall(r"[Rr]aise ([^,.]*(?:\.[a-z][^,.]*)*)", warning)
        assert not any("decay" in text or "clip" in text for text in raised), warning


def test_what_is_raised_is_what_holds_the_writes_down() -> None:
    health = with_layer(output_ratio=[0.001, 0.001, 0.002, 0.003])
    rule = replace(TRIED, write=WriteSettings(WriteKind.bounded, 0.2))
    keys = "ttt.eta (it is 0.5) or ttt.clip.bound (it is 0.1) or ttt.write.bound (it is 0.2) or"
    assert f"Raise {keys} ttt.decay (it is 0.9)" in warnings_of(health, rule)[0]
    assert "Raise ttt.eta (it is 0.3), or train longer" in warnings_of(health, RULE)[0]


def test_parts_that_are_off_are_to_be_switched_on() -> None:
    health = with_layer(effective_rank=[1.1, 1.2, 1.1, 1.3])
    assert "ttt.conv" not in warnings_of(health, RULE)[0]
    without = replace(RULE, conv=Conv.off)
    assert "train with ttt.conv=learned, so" in warnings_of(health, without)[0]
    assert "ttt.conv" not in warnings_of(health, replace(RULE, conv=Conv.next_token))[0]


def test_states_that_exploded_are_ill_whatever_the_loss_says() -> None:
    broken = with_layer(
        replace(HEALTHY, loss_on=INF),
        update_ratio=[0.2, INF, INF, INF],
        output_ratio=[0.2, NAN, NAN, NAN],
    )
    names = [warning.split(":")[0] for warning in warnings_of(broken, RULE)]
    assert names == ["loss with fast weights on minus off above 0.002", "update ratio above 0.3"]


def test_every_concern_has_a_case() -> None:
    for concern in CONCERNS:
        raised = [concern.warning(health, RULE) for health, *_ in CASES]
        assert any(raised), concern.figure


def test_values_are_valid_json() -> None:
    values = plain_values(with_layer(effective_rank=[NAN, INF, 2.0, 3.0]))
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text)["layers"][1]["effective_rank"] == [None, None, 2.0, 3.0]
