"""Figures of matrices whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ttt.evaluation.health_probe import (
    chosen_places,
    effective_rank,
    mean_key_share,
    output_ratio,
)
from megatron_ttt.fast_weights.scale import squares, update_ratio


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(sums: Tensor) -> Tensor:
    """A reduction over one tensor rank."""
    return sums


@pytest.mark.parametrize(
    ("chunks", "positions", "places"),
    [(17, 4, [4, 8, 12, 16]), (4, 8, [1, 2, 3]), (2, 1, [1]), (33, 1, [32]), (1, 8, [])],
)
def test_places_are_even_and_end_with_the_last_chunk(
    chunks: int, positions: int, places: list[int]
) -> None:
    assert chosen_places(chunks=chunks, positions=positions) == places


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


@pytest.mark.parametrize(
    ("singular", "rank"),
    [
        ([3.0, 0.0, 0.0, 0.0], 1.0),
        ([2.0, 2.0, 2.0, 0.0], 3.0),
        ([0.5, 0.5, 0.5, 0.5], 4.0),
        # exp(-(3/4 log 3/4 + 1/4 log 1/4)), not what squares (9/10, 1/10) would give
        ([3.0, 1.0, 0.0, 0.0], 4.0 / 3.0**0.75),
    ],
)
def test_effective_rank(singular: list[float], rank: float) -> None:
    matrix = orthogonal(4, 1) @ torch.diag(torch.tensor(singular).double()) @ orthogonal(6, 2)[:4]
    assert effective_rank(matrix @ matrix.T) == pytest.approx(rank, rel=1e-6)
    assert effective_rank(49 * matrix @ matrix.T) == pytest.approx(rank, rel=1e-6)


def test_effective_rank_of_nothing_is_no_number() -> None:
    assert math.isnan(effective_rank(torch.zeros(3, 3).double()))
    assert math.isnan(effective_rank(torch.full((3, 3), torch.inf).double()))


def test_mean_key_share_is_one_of_equal_keys_and_none_of_balanced_ones() -> None:
    targets = draw(1, 8, 5)
    written = torch.ones(1, 8, dtype=torch.bool)
    equal = draw(1, 1, 7).expand(1, 8, 7)
    assert mean_key_share(equal, targets, written, reduce_sums=whole).item() == pytest.approx(1)
    # Half the keys are one direction with targets that cancel, the rest another that is written:
    # the mean key is the first's, dW holds the second's alone.
    first, second = orthogonal(7, 3)[:2]
    keys = torch.stack([first, first, second, -second])[None]
    values = torch.stack([targets[0, 0], -targets[0, 0], targets[0, 1], -targets[0, 1]])[None]
    share = mean_key_share(keys, values, written[:, :4], reduce_sums=whole)
    assert share.item() == pytest.approx(0, abs=1e-12)


def test_mean_key_share_by_its_definition() -> None:
    keys, targets = draw(2, 8, 7, seed=4) + 0.4, draw(2, 8, 5, seed=5)
    written = torch.tensor([[True] * 8, [False, True, True, False] * 2])
    found = mean_key_share(keys, 3 * targets, written, reduce_sums=whole)
    for row in range(2):
        z, v = keys[row, written[row]], targets[row, written[row]]
        summary, mean = v.T @ z, z.mean(dim=0)
        along = summary @ (mean / mean.norm())
        expected = along.norm() ** 2 / summary.norm() ** 2
        assert 0.05 < expected < 0.95
        assert found[row].item() == pytest.approx(expected.item())


def test_rows_without_writes_or_readers_have_no_figure() -> None:
    keys, targets, weight, state = draw(1, 8, 7), draw(1, 8, 5), draw(5, 7), draw(1, 5, 7)
    nobody = torch.zeros(1, 8, dtype=torch.bool)
    assert mean_key_share(keys, targets, nobody, reduce_sums=whole).isnan().all()
    heard = output_ratio(state, keys, nobody, weight, eta=0.3, reduce_sums=whole)
    assert heard.isnan().all()


def test_ratios_by_their_definition() -> None:
    keys, weight, state = draw(2, 8, 7), draw(5, 7, seed=1), draw(2, 5, 7, seed=2)
    reads = torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    ratio = update_ratio(squares(state), squares(weight[None]), eta=-0.3)
    heard = output_ratio(state, keys, reads, weight, eta=-0.3, reduce_sums=whole)
    for row in range(2):
        z = keys[row, reads[row]]
        assert ratio[row] == pytest.approx(float(0.3 * state[row].norm() / weight.norm()))
        expected = 0.3 * (z @ state[row].T).norm() / (z @ weight.T).norm()
        assert heard[row] == pytest.approx(float(expected))
