"""Sampling keeps what it should keep, in the right proportions."""

from __future__ import annotations

import pytest
import torch

from megatron_ttt.inference.sampling import Sampler, Sampling

LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]]))


def kept(**settings: float) -> list[float]:
    probabilities = Sampler(Sampling(**{"temperature": 1.0, **settings})).probabilities(LOGITS)
    return [round(value, 4) for value in probabilities[0].tolist()]


def test_what_is_drawn_from() -> None:
    assert kept() == [0.05, 0.4, 0.15, 0.3, 0.1]
    assert kept(top_k=2) == [0.0, 0.5714, 0.0, 0.4286, 0.0]
    assert kept(top_p=0.6) == [0.0, 0.5714, 0.0, 0.4286, 0.0]
    assert kept(top_p=0.75) == [0.0, 0.4706, 0.1765, 0.3529, 0.0]
    assert kept(top_p=0.01) == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert kept(top_k=9, top_p=1.0) == kept()
    sharp = kept(temperature=0.5)
    assert sharp[1] / sharp[3] == pytest.approx((0.4 / 0.3) ** 2, rel=1e-3)


def test_draws() -> None:
    rows = LOGITS.expand(4000, -1)
    draws = torch.tensor(Sampler(Sampling(temperature=1.0, seed=1)).choose(rows))
    shares = torch.bincount(draws, minlength=5) / len(draws)
    assert torch.allclose(shares, LOGITS.exp()[0], atol=0.03)
    again = Sampler(Sampling(temperature=1.0, seed=1)).choose(rows)
    assert again == draws.tolist()
    assert Sampler(Sampling(temperature=1.0, seed=2)).choose(rows) != again
    assert set(Sampler(Sampling()).choose(rows)) == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_k": 0}, "top-k 0"),
        ({"top_p": 1.5}, "top-p 1.5"),
    ],
)
def test_values_that_mean_nothing(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
