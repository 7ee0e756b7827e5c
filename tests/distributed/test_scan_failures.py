"""Nothing hangs: a rank that dies, is late or disagrees becomes an error that says who and what."""

import re

import pytest

from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.scan_words import ScanAlgorithm
from tests.distributed.scan_failures import (
    TIMEOUT_S,
    scan_beside_a_fault,
    scan_differing,
    scan_unlike,
)
from tests.pool import RankPool, Status

SLACK_S = 6.0  # a loaded machine schedules late
NAMED = r"ScanError: scan {} of layer 6 over the cp group, rank {} of 4: .* rank \d"


def test_a_rank_dies_in_the_middle(pool: RankPool) -> None:
    outcomes = pool.outcomes(scan_beside_a_fault, ScanAlgorithm.ring, 1, None, ranks=4)
    assert [outcome.status is Status.DIED for outcome in outcomes] == [False, True, False, False]
    for rank in (0, 2, 3):
        message, seconds = outcomes[rank].value
        assert re.search(NAMED.format("ring", rank), message)
        assert seconds < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rank_is_later_than_the_timeout(pool: RankPool, algorithm: ScanAlgorithm) -> None:
    late = 2
    results = pool.run(scan_beside_a_fault, algorithm, late, TIMEOUT_S + 1.5, ranks=4)
    failed = [rank for rank, (message, _) in enumerate(results) if message]
    assert {0, 1, 3} <= set(failed)
    for rank in (0, 1, 3):
        message, seconds = results[rank]
        assert re.search(NAMED.format(algorithm.value, rank), message)
        assert seconds < TIMEOUT_S + SLACK_S
    assert any(seconds >= TIMEOUT_S - 0.1 for _, seconds in results)


def test_shapes_and_dtypes_that_differ_name_the_ranks(pool: RankPool) -> None:
    ring = ScanAlgorithm.ring
    same = [ring] * 3
    with pytest.raises(ValueError, match=r"ranks \[0, 2\]: states \[1, 2, 5\] of torch.float32"):
        pool.run(scan_differing, same, [5, 6, 5], ranks=3)
    with pytest.raises(ValueError, match=r"ranks \[1\]: states \[1, 2, 7\] of torch.bfloat16"):
        pool.run(scan_differing, same, [7, 0, 7], ranks=3)
    with pytest.raises(ValueError, match=r"ranks \[2\]: .* doubling in 1 block"):
        pool.run(scan_differing, [ring, ring, ScanAlgorithm.doubling], [5, 5, 5], ranks=3)
    pool.run(scan_differing, same, [5, 5, 5], ranks=3)


def test_another_shape_in_the_steady_state_ends_in_an_error(pool: RankPool) -> None:
    messages = pool.run(scan_unlike, ranks=3)
    assert "scan ring over the cp group, rank 0 of 3" in messages[0]
    assert "rank 0 of 3" not in messages[1] and "rank 0 (global rank 0)" in messages[1]
