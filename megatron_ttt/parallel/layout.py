"""Which context-parallel rank holds which spans of the sequence. Integers only, no process group.

A row of ``length`` tokens is cut into equal spans, numbered 0, 1, 2... in sequence order.
``zigzag`` gives rank ``r`` of ``P`` the spans ``r`` and ``2P-1-r`` (causal attention then costs
every rank the same), ``contiguous`` the span ``r``. A rank's memory holds its spans in the order
listed by :func:`spans_of_rank`.
"""

from megatron_ttt.scan_words import SequenceOrder


def spans_per_rank(order: SequenceOrder) -> int:
    """Spans that each rank holds: 2 for zigzag, 1 for contiguous."""
    return 2 if order is SequenceOrder.zigzag else 1


def total_spans(ranks: int, order: SequenceOrder) -> int:
    """Spans of the whole row. Raises ``ValueError`` if ``ranks`` is not positive."""
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: at least 1 is needed")
    return ranks * spans_per_rank(order)


def spans_of_rank(rank: int, ranks: int, order: SequenceOrder) -> list[int]:
    """Sequence positions of the spans in ``rank``'s memory, in memory order.

    Raises ``ValueError`` if ``rank`` is not one of ``0 .. ranks-1``.
    """
    spans = total_spans(ranks, order)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank = {rank}: not one of 0 to {ranks - 1}")
    return [rank] if order is SequenceOrder.contiguous else [rank, spans - 1 - rank]


def rank_of_span(span: int, ranks: int, order: SequenceOrder) -> int:
    """Return the rank that holds ``span``. Raises ``ValueError`` if the row has no such span."""
    spans = total_spans(ranks, order)
    if not 0 <= span < spans:
        raise ValueError(f"span = {span}: not one of 0 to {spans - 1}")
    return min(span, spans - 1 - span) if order is SequenceOrder.zigzag else span


def check_length(
    length: int, *, ranks: int, order: SequenceOrder, chunk_size: int | None = None
) -> None:
    """Raise ``ValueError``, naming the nearest valid lengths, unless spans are equal and whole.

    With ``chunk_size`` a span must also be whole chunks, except on one rank, where any length is
    valid: the fast weight's chunk grid is absolute, and a chunk must not lie across two ranks.
    """
    if ranks == 1:
        return
    unit = total_spans(ranks, order) * (1 if chunk_size is None else chunk_size)
    if length < 1 or length % unit:
        nearest = " or ".join(str(n) for n in nearest_valid_lengths(length, unit))
        what = f"{ranks} {order.value} ranks" + (
            "" if chunk_size is None else f" with chunks of {chunk_size} tokens"
        )
        raise ValueError(
            f"sequence length {length} does not fit {what}: it must be a multiple of {unit}; "
            f"nearest valid: {nearest}"
        )


def nearest_valid_lengths(length: int, unit: int) -> list[int]:
    """Return the positive multiples of ``unit`` next to ``length`` (itself if it is one)."""
    below = length // unit * unit
    return [n for n in sorted({below, -(-length // unit) * unit}) if n > 0] or [unit]


def token_ranges(rank: int, ranks: int, order: SequenceOrder, length: int) -> list[tuple[int, int]]:
    """Half-open token ranges of ``rank``'s spans in memory order, positions in the whole row.

    Raises ``ValueError`` if ``length`` is not a multiple of the number of spans (one rank holds any
    length, as one range if it cannot be halved).
    """
    if ranks == 1 and length % spans_per_rank(order):
        return [(0, length)]
    spans = total_spans(ranks, order)
    if length % spans:
        check_length(length, ranks=ranks, order=order)
    size = length // spans
    return [(span * size, (span + 1) * size) for span in spans_of_rank(rank, ranks, order)]
