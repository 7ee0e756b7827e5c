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
    route, rank, ranks = problem.route, problem.rank, problem.ranks
    slices = split(problem.elements, ranks)
    begin, end = slices[rank]
    size = end - begin
    mine, wanted = route.senders(rank), route.receivers(rank)
    for node in mine:
        yield Need(node)

    like = carries[problem.nodes[0]]
    sends, receives = [], []
    for step in range(1, ranks):
        to, source = (rank + step) % ranks, (rank - step) % ranks
        first, last = slices[to]
        if mine and last > first:
            buffer = problem.buffer(like, len(mine) * (last - first))
            for part, node in zip(buffer.split(last - first), mine, strict=True):
                part.copy_(summaries[node][first:last])
            sends.append(Message(to, buffer))
        if size and (theirs := route.senders(source)):
            receives.append(Message(source, problem.buffer(like, len(theirs) * size)))
    yield Exchange(sends, receives)

    pieces: dict[int, Tensor] = {node: summaries[node][begin:end] for node in mine}
    for message in receives:
        pieces |= zip(route.senders(message.peer), message.tensor.split(size), strict=True)
    entering = _scan_slice(problem, pieces, begin, carries) if size else {}

    sends, receives = [], []
    for step in range(1, ranks):
        to, source = (rank + step) % ranks, (rank - step) % ranks
        first, last = slices[source]
        if size and route.receivers(to):
            sends.append(Message(to, entering[to]))
        if wanted and last > first:
            receives.append(Message(source, problem.buffer(like, len(wanted) * (last - first))))
    yield Exchange(sends, receives)
    for message in receives:
        first, last = slices[message.peer]
        for part, node in zip(message.tensor.split(last - first), wanted, strict=True):
            carries[node][first:last].copy_(part)


def _scan_slice(
    problem: ScanProblem, pieces: dict[int, Tensor], begin: int, carries: Carries
) -> dict[int, Tensor]:
    """Carries of one slice by the rank that wants them; this rank's own go into ``carries``."""
    route = problem.route
    size = pieces[0].numel()
    entering: dict[int, Tensor] = {}
    parts: dict[int, Tensor] = {}
    for rank in range(problem.ranks):
        nodes = route.receivers(rank)
        if nodes and rank != problem.rank:
            entering[rank] = problem.buffer(pieces[0], len(nodes) * size)
            parts |= zip(nodes, entering[rank].split(size), strict=True)
    dtype = carries[problem.nodes[0]].dtype
    carry = pieces[0].to(dtype)
    for node in range(1, route.nodes):
        if node in parts:
            parts[node].copy_(carry)
        else:
            carries[node][begin : begin + size].copy_(carry)
        if node < route.nodes - 1:
            later = pieces[node].to(dtype)
            carry = problem.combine(route.keeps(node), carry, later, begin=begin)
    return entering
