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
    route = problem.route
    mine = route.senders(problem.rank)
    for node in mine:
        yield Need(node)
    sends = []
    if mine:
        outgoing = problem.packed([summaries[node] for node in mine])
        sends = [Message(to, outgoing) for to in problem.peers]
    counts = [(peer, len(route.senders(peer)) * problem.elements) for peer in problem.sources]
    receives = problem.expected(carries[problem.nodes[0]], counts)
    yield Exchange(sends, receives)
    gathered: dict[int, Tensor] = {node: summaries[node] for node in mine}
    for message in receives:
        gathered |= problem.unpacked(route.senders(message.peer), message.tensor)
    _fold(problem, gathered, carries)


def _fold(problem: ScanProblem, gathered: dict[int, Tensor], carries: Carries) -> None:
    wanted = problem.route.receivers(problem.rank)
    if not wanted:
        return
    carry = carries[wanted[-1]]  # the last carry's memory serves the running one
    carry.copy_(gathered[0])
    for node in range(1, wanted[-1]):
        if node in wanted:
            carries[node].copy_(carry)
        later = gathered[node]
        if later.dtype != carry.dtype:
            later = later.to(carry.dtype)
        problem.combine(problem.route.keeps(node), carry, later, out=carry)
