"""``ring``: the carry travels along the path of nodes in m blocks, each hop adding its summary.

ZeCO's All-Scan (arXiv 2507.01004) pipelines one state from rank to rank. Here the path also
bounces: for zigzag it goes up the first spans, turns on rank P-1, which holds two neighbouring
spans, and comes down the second ones, so both directions of every link are busy. A rank sends one
state per node: two at most. Slot s: node i sends block s-i and receives block s-i+1.
"""

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


def ring(problem: ScanProblem, summaries: Summaries, carries: Carries) -> Program:
    route, last = problem.route, problem.route.nodes - 1
    blocks = split(problem.elements, min(problem.blocks, problem.elements))
    first_slot = max(0, problem.nodes[0] - 1)
    for slot in range(first_slot, problem.nodes[-1] + len(blocks)):
        sends, receives, arriving = [], [], []
        for node in problem.nodes:
            outgoing, incoming = slot - node, slot - node + 1
            if node < last and 0 <= outgoing < len(blocks):
                if outgoing == 0:
                    yield Need(node)
                begin, end = blocks[outgoing]
                block = summaries[node][begin:end]
                if node > 0:
                    earlier = carries[node][begin:end]
                    block = problem.combine(route.keeps(node), earlier, block, begin=begin)
                sends.append(Message(route.owners[node + 1], problem.message(block)))
            if node > 0 and 0 <= incoming < len(blocks):
                begin, end = blocks[incoming]
                carry = carries[node][begin:end]
                buffer = carry
                if carry.dtype != problem.message_dtype:
                    buffer = problem.buffer(carry, end - begin)
                    arriving.append((carry, buffer))
                receives.append(Message(route.owners[node - 1], buffer))
        if sends or receives:
            yield Exchange(sends, receives)
        for carry, buffer in arriving:
            carry.copy_(buffer)
