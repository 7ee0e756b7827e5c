"""Whether NCCL could complete what the ranks of a job launched, from the launches alone.

Two checks, both over one list of launches per rank:

:func:`differences`
    Every communicator's collectives are the same on all its ranks, in the same order and of the
    same sizes and dtypes; what one rank sends another, that one receives, in the same order.

:func:`deadlock`
    The launches are replayed. A rank makes them one at a time, in its own order over *all* its
    communicators, and goes on when the one at hand is complete: a collective when all ranks of the
    communicator have come to it, a batch of messages when each has met its other half. A
    communicator is made at its first launch, by all its ranks together.

    This is stricter than any device. A replay that ends orders all launches of all ranks so that
    each comes after the earlier ones of its ranks; so no schedule in which a launch waits only for
    earlier launches of its rank (streams, events, one queue for all streams, a host that waits)
    contains a cycle.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tests.nccl.launches import Direction, Launch, Message

Launches = Sequence[Launch]  # of one rank
Value = TypeVar("Value")


def faults(records: Sequence[Launches]) -> list[str]:
    """What is wrong with the launches of all ranks (``records`` in rank order), in words."""
    return differences(records) or deadlock(records)


def differences(records: Sequence[Launches]) -> list[str]:
    """Where the ranks of a communicator do not launch the same; its first difference each."""
    groups = {launch.communicator: launch.ranks for record in records for launch in record}
    found = []
    for communicator, ranks in groups.items():
        held = {
            rank: [launch for launch in records[rank] if launch.communicator == communicator]
            for rank in ranks
        }
        found += _collectives_differ(held)
        for sender in ranks:
            for receiver in ranks:
                found += _messages_differ(communicator, held, sender, receiver)
    return found


def _collectives_differ(held: dict[int, list[Launch]]) -> list[str]:
    first, *others = (
        (rank, [launch for launch in launches if not launch.messages])
        for rank, launches in held.items()
    )
    for rank, launches in others:
        for number in range(max(len(first[1]), len(launches))):
            mine, theirs = (_at(some, number) for some in (first[1], launches))
            if mine != theirs:
                return [f"collective {number}: rank {first[0]} {mine}; rank {rank} {theirs}"]
    return []


def _messages_differ(
    communicator: str, held: dict[int, list[Launch]], sender: int, receiver: int
) -> list[str]:
    sent = list(_messages(held[sender], Direction.SEND, receiver))
    received = list(_messages(held[receiver], Direction.RECEIVE, sender))
    for number in range(max(len(sent), len(received))):
        gone, come = _at(sent, number), _at(received, number)
        if gone is None or come is None or not _fit(gone, come):
            where = f"message {number} from rank {sender} to rank {receiver} over {communicator}"
            return [f"{where}: {gone}; {come}"]
    return []


def _messages(launches: list[Launch], direction: Direction, peer: int) -> Iterator[Message]:
    for launch in launches:
        for message in launch.messages:
            if message.direction is direction and message.peer == peer:
                yield message


def _at(values: Sequence[Value], number: int) -> Value | None:
    return values[number] if number < len(values) else None


def _fit(one: Message, other: Message) -> bool:
    return (one.elements, one.dtype) == (other.elements, other.dtype)


class _Rank:
    """A rank of the replay: the launch at hand and its messages that have not met."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches
        self._next = 0
        self.now: Launch | None = None
        self.waiting: list[Message] = []
        self.advance()

    def advance(self) -> None:
        """Go on to the next launch; ``now`` is None after the last."""
        self.now = _at(self._launches, self._next)
        self._next += 1
        self.waiting = [] if self.now is None else list(self.now.messages)


def deadlock(records: Sequence[Launches]) -> list[str]:
    """Replay (see the module); where each rank stands if they cannot all come to their end.

    For launches without :func:`differences`.
    """
    ranks = [_Rank(launches) for launches in records]
    made: set[str] = set()
    while any(_progresses(number, ranks, made) for number in range(len(ranks))):
        pass
    if all(rank.now is None for rank in ranks):
        return []
    return [f"rank {number} waits in {rank.now or 'nothing'}" for number, rank in enumerate(ranks)]


def _progresses(number: int, ranks: list[_Rank], made: set[str]) -> bool:
    """Let a rank do what it can; whether that was anything."""
    rank = ranks[number]
    launch = rank.now
    if launch is None:
        return False
    present = [ranks[member].now for member in launch.ranks]
    together = all(now is not None and now.communicator == launch.communicator for now in present)
    if launch.communicator not in made and not together:
        return False
    made.add(launch.communicator)
    if not launch.messages:
        complete = together and all(now == launch for now in present)
        if complete:
            for member in launch.ranks:
                ranks[member].advance()
        return complete
    met = [message for message in rank.waiting if _meets(number, launch, message, ranks)]
    for message in met:
        rank.waiting.remove(message)
    if met and not rank.waiting:
        rank.advance()
    return bool(met)


def _meets(number: int, launch: Launch, message: Message, ranks: list[_Rank]) -> bool:
    """Join a message with its other half if that is under way; the peer may go on then."""
    peer = ranks[message.peer]
    if peer.now is None or peer.now.communicator != launch.communicator:
        return False
    other = Direction.RECEIVE if message.direction is Direction.SEND else Direction.SEND
    halves = [m for m in peer.waiting if m.direction is other and m.peer == number]
    if not halves or not _fit(halves[0], message):
        return False
    peer.waiting.remove(halves[0])
    if not peer.waiting:
        peer.advance()
    return True
