"""The replay on launches written by hand: what NCCL completes passes, what it cannot is named."""

from tests.nccl.launches import Direction, Launch, Message
from tests.nccl.replay import deadlock, differences, faults

SEND, RECEIVE = Direction.SEND, Direction.RECEIVE


def summed(group: str, *ranks: int, elements: int = 4) -> Launch:
    return Launch(group, ranks, "allreduce SUM", ((elements, "float32"),))


def batch(
    *messages: tuple[Direction, int], ranks: tuple[int, ...] = (0, 1), elements: int = 4
) -> Launch:
    halves = tuple(Message(how, peer, elements, "float32") for how, peer in messages)
    return Launch("pp", ranks, "messages", messages=halves)


def test_equal_launches_pass() -> None:
    record = [summed("tp", 0, 1), summed("dp", 0, 1, elements=7), summed("tp", 0, 1)]
    assert faults([record, list(record)]) == []


def test_another_size_another_operation_and_a_missing_launch_are_named() -> None:
    record = [summed("tp", 0, 1), summed("tp", 0, 1, elements=7)]
    for other in (record[::-1], record[:1], [record[0], summed("tp", 0, 1, elements=8)]):
        (line,) = differences([record, other])
        assert line.startswith("collective ") and "rank 0 allreduce SUM [" in line
    assert deadlock([record, record[:1]])[1] == "rank 1 waits in nothing"


def test_a_circle_over_two_communicators_is_found() -> None:
    """No communicator is at fault; a device that runs the launches one by one stands still."""
    tp, dp = summed("tp", 0, 1), summed("dp", 0, 1)
    assert differences([[tp, dp], [dp, tp]]) == []
    assert len(deadlock([[tp, dp], [dp, tp]])) == 2


def test_messages_in_both_directions_need_a_batch() -> None:
    both = [[batch((SEND, 1), (RECEIVE, 1))], [batch((SEND, 0), (RECEIVE, 0))]]
    assert faults(both) == []
    one_by_one = [[batch((how, 1 - rank)) for how in (SEND, RECEIVE)] for rank in (0, 1)]
    assert differences(one_by_one) == [] and len(deadlock(one_by_one)) == 2
    one_by_one[1].reverse()
    assert faults(one_by_one) == []


def test_a_batch_may_meet_two_of_its_peer() -> None:
    first = [batch((SEND, 1), (RECEIVE, 1))]
    assert faults([first, [batch((RECEIVE, 0)), batch((SEND, 0))]]) == []


def test_a_message_of_another_size_or_that_no_one_receives_is_named() -> None:
    sent = [batch((SEND, 1))]
    (line,) = differences([sent, [batch((RECEIVE, 0), elements=5)]])
    assert "message 0 from rank 0 to rank 1" in line
    assert len(differences([sent, []])) == 1


def test_all_ranks_make_a_communicator_together() -> None:
    """A first message between two ranks waits for the third, which is elsewhere."""
    ranks = (0, 1, 2)
    pair = [[batch((SEND, 1), ranks=ranks)], [batch((RECEIVE, 0), ranks=ranks)]]
    assert len(deadlock([*pair, []])) == 3
    begin = summed("pp", *ranks)
    assert faults([[begin, *pair[0]], [begin, *pair[1]], [begin]]) == []
