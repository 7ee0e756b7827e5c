"""``all_to_all``: rank t scans slice t of every node's state and returns everybody's carries.

Two rounds of P-1 messages of 1/P of a state: each element crosses the network twice, whatever P.
"""

from torch import Tensor

from megatron_ttt.parallel.scan_algorithms.problem import (
    Carries,
    Exchange,
    Message,
    Need,
    Program,
    ScanProblem,
    Summaries,
    split,
)


def all_to_all(problem: ScanProblem, summaries: Summaries, carries: Carries) -> Program:
    route, rank = problem.route, problem.rank
    sizes = [end - begin for begin, end in split(problem.elements, problem.ranks)]
    mine, wanted = route.senders(rank), route.receivers(rank)
    for node in mine:
        yield Need(node)

    given = {node: summaries[node].split(sizes) for node in mine}
    sends = [
        Message(to, problem.packed([given[node][to] for node in mine]))
        for to in problem.peers
        if mine and sizes[to]
    ]
    like = carries[problem.nodes[0]]
    counts = [(peer, len(route.senders(peer)) * sizes[rank]) for peer in problem.sources]
    receives = problem.expected(like, counts)
    yield Exchange(sends, receives)

    pieces = {node: given[node][rank] for node in mine}
    for message in receives:
        pieces |= problem.unpacked(route.senders(message.peer), message.tensor)
    entering = _scan_slice(problem, pieces, like) if sizes[rank] else {}

    sends = [
        Message(to, problem.packed([entering[node] for node in route.receivers(to)]))
        for to in problem.peers
        if sizes[rank] and route.receivers(to)
    ]
    counts = [(peer, len(wanted) * sizes[peer]) for peer in problem.sources]
    receives = problem.expected(like, counts)
    yield Exchange(sends, receives)

    kept = {node: carries[node].split(sizes) for node in wanted}
    for node in wanted:
        if sizes[rank]:
            kept[node][rank].copy_(entering[node])
    for message in receives:
        for node, part in problem.unpacked(wanted, message.tensor).items():
            kept[node][message.peer].copy_(part)


def _scan_slice(problem: ScanProblem, pieces: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
    """Return this rank's slice of the carry of every node but the first, by node."""
    route = problem.route
    begin, _ = split(problem.elements, problem.ranks)[problem.rank]
    carry = pieces[0].to(like.dtype)
    entering = {1: carry}
    for node in range(1, route.nodes - 1):
        later = pieces[node]
        if later.dtype != like.dtype:
            later = later.to(like.dtype)
        carry = problem.combine(route.keeps(node), carry, later, begin=begin)
        entering[node + 1] = carry
    return entering
