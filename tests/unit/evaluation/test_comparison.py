"""Settings over seeds: who is grouped with whom, and which baseline a gain is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ttt.evaluation.comparison import compare, group, read_result


def write(
    folder: Path,
    name: str,
    far: float,
    *,
    seed: int = 1,
    mode: str = "in_place",
    eta: float = 1.0,
    sigma: float = 0.02,
    length: int = 4,
    read_eta: float | None = None,
    text: str | None = "5e1f",
) -> Path:
    """A result with four bins of one token; the window covers the first two."""
    losses = [9.0, 9.0, far - 0.1, far + 0.1]
    readings: dict[str, Any] = {"off": {"loss_by_position": losses}}
    if mode == "in_place":
        readings["in_place"] = {"loss_by_position": losses}
        readings["off"] = {"loss_by_position": [9.0, 9.0, 7.0, 7.0]}
    document = {
        "ttt": {"mode": mode, "eta": eta if read_eta is None else read_eta},
        "trained": {
            "ttt": {"mode": mode, "eta": eta},
            "model": {"initializer_range": sigma},
            "train": {"seed": seed},
            "run": {"name": name},
        },
        "readings": readings,
        "length": length,
        "rows": 3,
        "bins": [[0, 1], [1, 2], [2, 3], [3, 4]],
        "sliding_window": 2,
    }
    if text is not None:
        document["text_sha256"] = text
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "on1", 1.0, seed=1),
        write(tmp_path, "on2", 1.4, seed=2),
        write(tmp_path, "off1", 1.5, seed=1, mode="off", eta=0.3),
        write(tmp_path, "off2", 1.7, seed=2, mode="off"),
    ]
    report = compare([read_result(file) for file in files])
    baseline, reference = report.values["settings"]
    assert (baseline["setting"], reference["setting"]) == ("ttt=off", "reference")
    assert reference["gains"] == pytest.approx([-0.5, -0.3])
    assert baseline["gains"] == []
    _, row = report.tables[0].rows
    assert row[0] == "reference" and row[1] == 2
    assert row[2:6] == pytest.approx([(18 + 2.4) / 4, 1.2, 0.2828, 7.0], abs=1e-3)
    assert row[6:] == pytest.approx([-0.4, 0.1414], abs=1e-3)
    assert report.draw is not None and report.draw().axes


def test_settings_are_named_by_what_differs_and_find_their_baseline(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "a", 1.0),
        write(tmp_path, "b", 1.1, seed=2),
        write(tmp_path, "c", 1.3, eta=3.0),
        write(tmp_path, "d", 0.5, sigma=0.1),
        write(tmp_path, "e", 2.0, mode="off"),
        write(tmp_path, "f", 0.6, mode="off", sigma=0.1),
    ]
    settings = group([read_result(file) for file in files])
    labels = [setting.label for setting in settings]
    assert labels == [
        "ttt=off model.initializer_range=0.1",
        "ttt=off",
        "model.initializer_range=0.1",
        "reference",
        "ttt.eta=3.0",
    ]
    values = {s["setting"]: s for s in compare([read_result(f) for f in files]).values["settings"]}
    assert values["model.initializer_range=0.1"]["gains"] == pytest.approx([-0.1])
    assert values["ttt.eta=3.0"]["gains"] == pytest.approx([-0.7])


def test_reading_under_another_rule_is_not_training_under_it(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "a", 1.0),
        write(tmp_path, "b", 1.3, eta=3.0),
        write(tmp_path, "c", 1.2, read_eta=3.0),
    ]
    settings = group([read_result(file) for file in files])
    assert [setting.label for setting in settings] == [
        "reference",
        "read ttt.eta=3.0",
        "ttt.eta=3.0",
    ]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    one = read_result(write(tmp_path, "a", 1.0))
    with pytest.raises(ValueError, match=r"a\.json: the same setting and seed"):
        group([one, read_result(write(tmp_path, "b", 1.0))])
    with pytest.raises(ValueError, match=r"read other text: \(length, rows, bins\)"):
        group([one, read_result(write(tmp_path, "c", 1.0, length=8))])
    (tmp_path / "d.json").write_text('{"task": "speed"}')
    with pytest.raises(ValueError, match=r"d\.json: no result of task=perplexity"):
        read_result(tmp_path / "d.json")


def test_another_text_of_the_same_size_is_refused(tmp_path: Path) -> None:
    old = read_result(write(tmp_path, "old", 1.2, eta=3.0, text=None))
    one = read_result(write(tmp_path, "one", 1.0))
    other = read_result(write(tmp_path, "other", 1.1, seed=2, text="0ther"))
    for results in ([one, other], [old, one, other], [other, old, one]):
        with pytest.raises(ValueError, match="read other text of the same length: text_sha256"):
            compare(results)
    assert compare([one]).warnings == []


def test_a_text_that_is_not_named_is_a_warning(tmp_path: Path) -> None:
    old = read_result(write(tmp_path, "old", 1.2, eta=3.0, text=None))
    one = read_result(write(tmp_path, "one", 1.0))
    (warning,) = compare([one, old]).warnings
    assert warning.startswith("1 of 2 results have no text_sha256") and "old.json" in warning
