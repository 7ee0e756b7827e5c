"""Who holds which token: every token once, in the documented order, at any number of ranks."""

import pytest

from megatron_ttt.parallel.layout import (
    check_length,
    nearest_valid_lengths,
    rank_of_span,
    spans_of_rank,
    spans_per_rank,
    token_ranges,
    total_spans,
)
from megatron_ttt.scan_words import SequenceOrder

ORDERS = list(SequenceOrder)


def test_zigzag_on_four_ranks_is_megatrons_balanced_order() -> None:
    held = [spans_of_rank(rank, 4, SequenceOrder.zigzag) for rank in range(4)]
    assert held == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_contiguous_on_three_ranks() -> None:
    held = [spans_of_rank(rank, 3, SequenceOrder.contiguous) for rank in range(3)]
    assert held == [[0], [1], [2]]


def test_token_ranges_of_rank_one_of_two() -> None:
    assert token_ranges(1, 2, SequenceOrder.zigzag, 16) == [(4, 8), (8, 12)]
    assert token_ranges(1, 2, SequenceOrder.contiguous, 16) == [(8, 16)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 7, 8, 64])
def test_every_token_has_one_rank(order: SequenceOrder, ranks: int) -> None:
    length = total_spans(ranks, order) * 3
    tokens: list[int] = []
    for rank in range(ranks):
        for begin, end in token_ranges(rank, ranks, order, length):
            tokens += range(begin, end)
        for span in spans_of_rank(rank, ranks, order):
            assert rank_of_span(span, ranks, order) == rank
        assert len(spans_of_rank(rank, ranks, order)) == spans_per_rank(order)
    assert sorted(tokens) == list(range(length))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zigzag_balances_causal_work(ranks: int) -> None:
    work = [sum(spans_of_rank(rank, ranks, SequenceOrder.zigzag)) for rank in range(ranks)]
    assert len(set(work)) == 1


def test_one_rank_takes_any_length() -> None:
    check_length(17, ranks=1, order=SequenceOrder.zigzag, chunk_size=4)
    assert token_ranges(0, 1, SequenceOrder.zigzag, 17) == [(0, 17)]
    assert token_ranges(0, 1, SequenceOrder.contiguous, 17) == [(0, 17)]


def test_a_wrong_length_names_the_nearest_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"length 1000 .* multiple of 256; nearest valid: 768 or 1024"
    ):
        check_length(1000, ranks=2, order=SequenceOrder.zigzag, chunk_size=64)
    with pytest.raises(ValueError, match="multiple of 192; nearest valid: 192"):
        check_length(100, ranks=3, order=SequenceOrder.contiguous, chunk_size=64)
    with pytest.raises(ValueError, match=r"length 30 .* multiple of 8"):
        token_ranges(0, 4, SequenceOrder.zigzag, 30)
    check_length(1024, ranks=2, order=SequenceOrder.zigzag, chunk_size=64)
    assert nearest_valid_lengths(512, 256) == [512]


@pytest.mark.parametrize("order", ORDERS)
def test_impossible_ranks_and_spans_are_refused(order: SequenceOrder) -> None:
    with pytest.raises(ValueError, match="ranks = 0"):
        total_spans(0, order)
    with pytest.raises(ValueError, match="rank = 4"):
        spans_of_rank(4, 4, order)
    with pytest.raises(ValueError, match="span = -1"):
        rank_of_span(-1, 4, order)
