"""What a person reads of a step."""

import io
import re

import pytest
from rich.console import Console

from megatron_ttt.training.metrics import Terminal


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.0, "0.000"), (0.6537, "0.654"), (0.01, "0.010"), (2e-5, "2.0e-05")]
)
def test_small_update_ratios_are_not_rounded_to_zero(ratio: float, said: str) -> None:
    assert f"update ratio {said}  left" in line_of(ratio, steps=10)


@pytest.mark.parametrize(
    ("steps", "said"), [(2, r"0:0\d"), (4000, r"\d:\d\d:\d\d"), (10**6, r"\d+ d \d+:\d\d:\d\d")]
)
def test_the_time_left_is_readable(steps: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0])  # five seconds for the first step
    monkeypatch.setattr("time.monotonic", lambda: next(clock, 5.0))
    assert re.search(rf"left {said}$", line_of(0.1, steps=steps).strip())


def line_of(ratio: float, *, steps: int) -> str:
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=200), steps=steps, done=0, interval=1)
    figures = {"loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0}
    terminal.write({"step": 1, **figures, "ttt/update_ratio/layer_01": ratio})
    return text.getvalue()
