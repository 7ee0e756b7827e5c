"""``all_gather``: everybody's summaries to everybody, then each rank folds what lies before it.

The reference: what LASP-2 (arXiv 2502.07563) and flash-linear-attention do. One round; a rank sends
its summaries P-1 times and holds those of all ranks.
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
)


def all_gather(problem: ScanProblem, summaries: Summaries, carries: Carries) -> Program:
    route, rank, ranks = problem.route, problem.rank, problem.ranks
    mine = route.senders(rank)
    for node in mine:
        yield Need(node)
    like = carries[problem.nodes[0]]
    outgoing = problem.buffer(like, len(mine) * problem.elements)
    for index, node in enumerate(mine):
        outgoing[index * problem.elements : (index + 1) * problem.elements].copy_(summaries[node])
    sends, receives = [], []
    for step in range(1, ranks):  # starting at the neighbour, no two ranks send to the same one
        to, source = (rank + step) % ranks, (rank - step) % ranks
        if mine:
            sends.append(Message(to, outgoing))
        if theirs := route.senders(source):
            buffer = problem.buffer(like, len(theirs) * problem.elements)
            receives.append(Message(source, buffer))
    yield Exchange(sends, receives)
    gathered: dict[int, Tensor] = {node: summaries[node] for node in mine}
    for message in receives:
        nodes = route.senders(message.peer)
        gathered |= zip(nodes, message.tensor.split(problem.elements), strict=True)
    _fold(problem, gathered, carries)


def _fold(problem: ScanProblem, gathered: dict[int, Tensor], carries: Carries) -> None:
    wanted = problem.route.receivers(problem.rank)
    if not wanted:
        return
    carry = carries[wanted[-1]]  # the last carry's memory serves the running one
    carry.copy_(gathered[0])
    for node in range(1, wanted[-1] + 1):
        if node in wanted and node != wanted[-1]:
            carries[node].copy_(carry)
        if node < wanted[-1]:
            later = gathered[node].to(carry.dtype)
            problem.combine(problem.route.keeps(node), carry, later, out=carry)
