"""Norms that stay exact for matrices of the size that models have."""

import pytest
import torch

from megatron_ttt.fast_weights import plan_chunks
from megatron_ttt.fast_weights.scale import spectral_norms, squares, weight_norm


def test_squares_of_a_large_matrix() -> None:
    """torch's norm of all elements at once, in fp32 on a CPU, is off by 3e-3 here."""
    matrix_DF = torch.randn(2560, 9728, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in matrix_DF.split(256))
    assert float(squares(matrix_DF[None])) == pytest.approx(exact, rel=1e-6)
    assert float(weight_norm(matrix_DF, lambda sums: sums)) == pytest.approx(exact**0.5, rel=1e-6)


@pytest.mark.parametrize(("mean", "least"), [(0.0, 0.8), (0.5, 0.97), (2.0, 0.999)])
def test_spectral_norms_are_at_most_the_exact_ones_and_near_them(mean: float, least: float) -> None:
    """Random keys, the worst there are; and keys with a share in common, as a model's have."""
    generator = torch.Generator().manual_seed(0)
    keys, targets = (
        torch.randn(2, 200, size, generator=generator, dtype=torch.float64) for size in (96, 40)
    )
    keys += mean * torch.randn(96, generator=generator, dtype=torch.float64)
    plan = plan_chunks(None, batch=2, length=200, chunk_size=64, device="cpu")
    found_BN = spectral_norms(keys, targets, plan, lambda sums: sums)
    for row in range(2):
        for chunk in range(3):
            tokens = slice(chunk * 64, chunk * 64 + 64)
            summary = targets[row, tokens].T @ keys[row, tokens]
            ratio = float(found_BN[row, chunk] / torch.linalg.matrix_norm(summary, 2))
            assert least <= ratio <= 1 + 1e-12
    assert not found_BN[:, 3].any()  # unfinished: nothing is written
