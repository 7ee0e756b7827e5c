"""Losses by position: means, and how sure a difference is."""

import math

import pytest
import torch

from megatron_ttt.evaluation.losses import Losses


def losses(rows: list[list[float]]) -> Losses:
    total = torch.tensor(rows, dtype=torch.float64)
    return Losses(total, torch.ones_like(total))


def test_the_error_of_a_difference_is_that_of_paired_rows() -> None:
    on, off = losses([[1.0, 2.0], [3.0, 2.0]]), losses([[2.0, 2.0], [2.0, 2.0]])
    assert on.error_of_difference(off) == pytest.approx([2**0.5 / math.sqrt(2), 0.0])
    assert on.by_bin() == [2.0, 2.0] and on.mean() == 2.0


def test_one_row_says_nothing_about_others() -> None:
    assert losses([[1.0, 2.0]]).error_of_difference(losses([[2.0, 2.0]])) == [None, None]
