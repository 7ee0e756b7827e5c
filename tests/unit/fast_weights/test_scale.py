"""Norms that stay exact for matrices of the size that models have."""

import pytest
import torch

from megatron_ttt.fast_weights.scale import squares, weight_norm


def test_squares_of_a_large_matrix() -> None:
    """torch's norm of all elements at once, in fp32 on a CPU, is off by 3e-3 here."""
    matrix_DF = torch.randn(2560, 9728, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in matrix_DF.split(256))
    assert float(squares(matrix_DF[None])) == pytest.approx(exact, rel=1e-6)
    assert float(weight_norm(matrix_DF, lambda sums: sums)) == pytest.approx(exact**0.5, rel=1e-6)
