"""What a run consumed, under any sequence of batch sizes."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ttt.checkpoints.progress import BEGINNING, Progress

BATCHES = st.lists(st.integers(1, 9), max_size=30)


def after(batches: list[int], *, seq_length: int = 16) -> Progress:
    progress = BEGINNING
    for batch in batches:
        progress = progress.after_step(batch, seq_length=seq_length)
    return progress


@given(BATCHES, st.integers(1, 9), st.integers(0, 40))
def test_samples_are_counted_step_by_step(batches: list[int], batch: int, step: int) -> None:
    progress = after(batches)
    assert (progress.step, progress.consumed_samples) == (len(batches), sum(batches))
    assert progress.consumed_tokens == 16 * sum(batches)
    expected = sum(batches[:step]) + max(step - len(batches), 0) * batch
    assert progress.samples_at(step, batch) == expected


@given(BATCHES)
def test_a_manifest_gives_back_what_it_was_given(batches: list[int]) -> None:
    progress = after(batches)
    assert Progress.read(json.loads(json.dumps(asdict(progress)))) == progress


def test_a_manifest_without_batches_tells_the_mean() -> None:
    document = {"step": 8, "consumed_samples": 32, "consumed_tokens": 4096, "metrics_bytes": 7}
    progress = Progress.read(document)
    assert [progress.samples_at(step, 8) for step in (0, 5, 8, 10)] == [0, 20, 32, 48]
    assert progress.after_step(8, seq_length=128).batches == ((8, 4), (1, 8))
    odd = Progress.read({**document, "consumed_samples": 35})
    assert [odd.samples_at(step, 8) for step in (8, 9)] == [35, 43]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "8"},
        {"consumed_samples": 4.0},
        {"metrics_bytes": True},
        {"batches": [[7, 4]]},  # does not add up to 8 steps
        {"batches": [[8, 5]]},  # nor to 32 samples
        {"batches": [[8]]},
        {"batches": 3},
        {"more": 1},
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    document = {"step": 8, "consumed_samples": 32, "consumed_tokens": 4096, "metrics_bytes": 7}
    with pytest.raises((ValueError, TypeError)):
        Progress.read({**document, **changes})
