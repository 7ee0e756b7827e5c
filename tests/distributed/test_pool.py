"""The pool of ranks itself: values, failures, recovery, other world sizes, speed."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankDied, RankPool, RankTimeout, Status


def rank_sum(rank: int, ranks: int, offset: int) -> tuple[int, int, int]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return int(total), dist.get_world_size(), os.getpid()


def fail_on(rank: int, ranks: int, failing: int) -> None:
    if rank == failing:
        raise KeyError("the failing rank's own words")
    dist.barrier()


def fail_everywhere(rank: int, ranks: int) -> None:
    raise ValueError(f"refused by {rank}")


def die_on(rank: int, ranks: int, dying: int) -> str:
    if rank == dying:
        os._exit(7)
    return "alive"


def sleep_on(rank: int, ranks: int, sleeping: int) -> str:
    if rank == sleeping:
        time.sleep(600)
    return "awake"


def check_alive(pool: RankPool, ranks: int) -> None:
    totals = [value[:2] for value in pool.run(rank_sum, 1, ranks=ranks)]
    assert totals == [(ranks * (ranks + 1) // 2, ranks)] * ranks


def test_world_sizes_share_processes(pool: RankPool) -> None:
    wide = pool.run(rank_sum, 0, ranks=4)
    narrow = pool.run(rank_sum, 0, ranks=3)
    again = pool.run(rank_sum, 0, ranks=4)
    assert [value[:2] for value in wide] == [(6, 4)] * 4
    assert [value[:2] for value in narrow] == [(3, 3)] * 3
    assert [value[2] for value in again] == [value[2] for value in wide]
    assert [value[2] for value in narrow] == [value[2] for value in wide[:3]]


def test_exception_keeps_type_and_traceback(pool: RankPool) -> None:
    with pytest.raises(KeyError, match="the failing rank's own words") as caught:
        pool.run(fail_on, 1, ranks=3)
    notes = "".join(caught.value.__notes__)
    assert "rank 1 of 3" in notes and "fail_on" in notes
    check_alive(pool, 3)


def test_symmetric_refusal_keeps_processes(pool: RankPool) -> None:
    before = [value[2] for value in pool.run(rank_sum, 0, ranks=2)]
    with pytest.raises(ValueError, match="refused by 0"):
        pool.run(fail_everywhere, ranks=2)
    after = [value[2] for value in pool.run(rank_sum, 0, ranks=2)]
    assert after == before


def test_death_is_reported_and_survived(pool: RankPool) -> None:
    with pytest.raises(RankDied, match="rank 1 of 2 died, exit code 7"):
        pool.run(die_on, 1, ranks=2)
    outcomes = pool.outcomes(die_on, 0, ranks=2)
    assert [outcome.status for outcome in outcomes] == [Status.DIED, Status.RETURNED]
    assert outcomes[1].value == "alive"
    check_alive(pool, 2)


def test_hang_hits_the_timeout(pool: RankPool) -> None:
    pool.run(rank_sum, 0, ranks=2)
    began = time.monotonic()
    with pytest.raises(RankTimeout, match=r"rank\(s\) \[1\]") as caught:
        pool.run(sleep_on, 1, ranks=2, timeout=1.0)
    assert time.monotonic() - began < 5.0
    assert "sleep_on" in "".join(caught.value.__notes__)
    check_alive(pool, 2)


def test_a_message_is_quick(pool: RankPool) -> None:
    pool.run(rank_sum, 0, ranks=2)
    durations = []
    for _ in range(9):
        began = time.monotonic()
        pool.run(rank_sum, 0, ranks=2)
        durations.append(time.monotonic() - began)
    assert min(durations) < 0.1


def test_too_many_ranks_are_refused(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="ranks = 9"):
        pool.run(rank_sum, 0, ranks=9)
