"""``doubling``: Hillis and Steele's scan (Comm. ACM 29, 1986) over the nodes of all ranks.

Node i keeps a window ``W`` (the nodes that end with it) and an exclusive ``X`` (those before it).
In the round with d = 1, 2, 4... it sends ``W`` to node i+d, which sets ``X = W_in . X`` and
``W = W_in . W``. ceil(log2 N) rounds of whole states: best where latency counts, states are small.
"""

from torch import Tensor

from megatron_ttt.parallel.scan_algorithms.problem import (
    Carries,
    Exchange,
    Keeps,
    Message,
    Need,
    Program,
    ScanProblem,
    Summaries,
)


def doubling(problem: ScanProblem, summaries: Summaries, carries: Carries) -> Program:
    route = problem.route
    for node in route.senders(problem.rank):
        yield Need(node)
    windows: dict[int, Tensor] = {node: summaries[node] for node in route.senders(problem.rank)}
    exclusive_keeps = {node: Keeps([1.0] * problem.rows) for node in problem.nodes}
    for level in range((route.nodes - 1).bit_length()):
        distance = 1 << level
        sends, receives, incoming = [], [], {}
        for node in problem.nodes:
            to, source = node + distance, node - distance
            if to < route.nodes and route.owners[to] != problem.rank:
                sends.append(Message(route.owners[to], problem.message(windows[node])))
            if source >= 0 and route.owners[source] == problem.rank:
                incoming[node] = windows[source]  # both nodes are here
            elif source >= 0:
                incoming[node] = problem.buffer(carries[node], problem.elements)
                receives.append(Message(route.owners[source], incoming[node]))
        yield Exchange(sends, receives)
        for node, window in incoming.items():
            exclusive_keeps[node] = _join(
                problem, node, level, window, windows, carries, exclusive_keeps[node]
            )


def _join(
    problem: ScanProblem,
    node: int,
    level: int,
    incoming: Tensor,
    windows: dict[int, Tensor],
    carries: Carries,
    exclusive_keeps: Keeps,
) -> Keeps:
    """Put the window that ends ``2**level`` nodes earlier in front of this node's two windows.

    Returns the keeps of the longer exclusive window.
    """
    route, distance = problem.route, 1 << level
    if level == 0:
        carries[node].copy_(incoming)
    else:
        carry = carries[node]
        problem.combine(exclusive_keeps, incoming, carry, out=carry)
    if node + 2 * distance < route.nodes:  # still to be sent
        keeps = route.window_keeps(node, level)
        windows[node] = problem.combine(keeps, incoming, windows[node])
    return exclusive_keeps.then(route.window_keeps(node - distance, level))
