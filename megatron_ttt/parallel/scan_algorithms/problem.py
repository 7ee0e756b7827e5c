"""What every algorithm works on: nodes on a path of ranks, and the monoid's one operation.

Spans that are neighbours in the sequence *and* lie on one rank form one **node** (zigzag: the two
middle spans, both on rank P-1). Along the direction of the scan the nodes form a path that visits
ranks 0, 1, ..., P-1 and, for zigzag, bounces back P-2, ..., 0. With ``(k_i, S_i)`` the keep and
summary of node ``i``, the carries wanted are

    E_0 = 0        E_{i+1} = k_i E_i + S_i

so the summary of the last node is never needed, and node 0 needs no message.

States are flat here: E elements = B rows, each of E / B. N nodes.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.layout import rank_of_span, total_spans
from megatron_ttt.scan_words import SequenceOrder


class Message(NamedTuple):
    """A contiguous tensor to or from ``peer`` (a rank of the group)."""

    peer: int
    tensor: Tensor


@dataclass(frozen=True)
class Exchange:
    """One round of a rank: the program goes on when every ``receives`` is filled.

    At most one message per pair and direction. Sent tensors are never written again.
    """

    sends: Sequence[Message] = ()
    receives: Sequence[Message] = ()


@dataclass(frozen=True)
class Need:
    """The program goes on when the summary of local node ``node`` has been handed in."""

    node: int


Program = Generator[Exchange | Need, None, None]
Summaries = Mapping[int, Tensor]  # by node, flat [E], state dtype; never written by a program
Carries = Mapping[int, Tensor]  # by node, flat [E], state dtype; filled by the program (not node 0)


@dataclass(frozen=True)
class Keeps:
    """What one run of nodes keeps of the state that enters it, for each row.

    ``host``: in [0, 1], known to every rank; 0 selects. ``factors_B``: positive, on the states'
    device, where the write rule gives factors that depend on data; they multiply.
    """

    host: Sequence[float]
    factors_B: Tensor | None = None

    def then(self, later: "Keeps") -> "Keeps":
        """Return the keeps of this run followed by ``later``."""
        factors_B = self.factors_B
        if factors_B is not None and later.factors_B is not None:
            factors_B = factors_B * later.factors_B
        host = [mine * theirs for mine, theirs in zip(self.host, later.host, strict=True)]
        return Keeps(host, later.factors_B if factors_B is None else factors_B)


@dataclass(frozen=True)
class Route:
    """Who owns which node, and every node's keep; equal on all ranks.

    ``keeps_NB``: float64 on the CPU, in [0, 1], in the order of the path. ``factors_NB``: see
    :class:`Keeps`.
    """

    owners: tuple[int, ...]
    keeps_NB: Tensor
    factors_NB: Tensor | None = None

    @property
    def nodes(self) -> int:
        return len(self.owners)

    @cached_property
    def _senders(self) -> list[list[int]]:
        return [[n for n in nodes if n != self.nodes - 1] for nodes in self.nodes_of_rank]

    @cached_property
    def _receivers(self) -> list[list[int]]:
        return [[n for n in nodes if n != 0] for nodes in self.nodes_of_rank]

    @cached_property
    def nodes_of_rank(self) -> list[list[int]]:
        held: list[list[int]] = [[] for _ in range(max(self.owners) + 1)]
        for node, rank in enumerate(self.owners):
            held[rank].append(node)
        return held

    def senders(self, rank: int) -> list[int]:
        """Nodes of ``rank`` whose summary somebody else may need: all but the last of the path."""
        return self._senders[rank]

    def receivers(self, rank: int) -> list[int]:
        """Nodes of ``rank`` that something enters: all but the first of the path."""
        return self._receivers[rank]

    def keeps(self, node: int) -> Keeps:
        """Keep of ``node`` for each row."""
        return self.window_keeps(node, 0)

    @cached_property
    def _window_hosts(self) -> list[list[list[float]]]:
        return [table.tolist() for table in _window_products(self.keeps_NB)]

    @cached_property
    def _window_factors(self) -> list[Tensor] | None:
        return None if self.factors_NB is None else _window_products(self.factors_NB)

    def window_keeps(self, node: int, level: int) -> Keeps:
        """Product of the keeps of the ``2**level`` nodes that end with ``node`` (or all before)."""
        factors = self._window_factors
        return Keeps(
            self._window_hosts[level][node], None if factors is None else factors[level][node]
        )


@dataclass
class ScanProblem:
    """One rank's part of one scan. ``blocks``: pieces that ``ring`` pipelines."""

    route: Route
    rank: int
    ranks: int
    elements: int
    rows: int
    message_dtype: torch.dtype
    blocks: int = 1
    combined_elements: int = field(default=0, init=False)  # work done, for the simulated clock

    @property
    def nodes(self) -> list[int]:
        return self.route.nodes_of_rank[self.rank]

    @property
    def peers(self) -> list[int]:
        """The other ranks from the neighbour on: no two ranks send to one at the same time."""
        return [(self.rank + step) % self.ranks for step in range(1, self.ranks)]

    @property
    def sources(self) -> list[int]:
        """The other ranks in the order in which they send to this one."""
        return [(self.rank - step) % self.ranks for step in range(1, self.ranks)]

    def combine(
        self,
        keeps: Keeps,
        earlier: Tensor,
        later: Tensor,
        *,
        begin: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """``k * earlier + later``, elements ``begin`` onwards of a state, in ``later``'s dtype.

        A keep of 0 selects ``later``: infinities and NaNs of another document do not pass.
        ``out`` may be ``earlier`` or ``later``; without it the result may *be* ``later``.
        """
        self.combined_elements += later.numel()
        host, factors_B = keeps.host, keeps.factors_B
        if factors_B is None and all(keep == host[0] for keep in host):
            return _combine(host[0], None, earlier, later, out)
        if out is None:
            out = torch.empty_like(later)
        size = self.elements // self.rows
        end = begin + later.numel()
        for row in range(begin // size, -(-end // size)):
            part = slice(max(begin, row * size) - begin, min(end, (row + 1) * size) - begin)
            factor = None if factors_B is None else factors_B[row]
            _combine(host[row], factor, earlier[part], later[part], out[part])
        return out

    def message(self, state: Tensor) -> Tensor:
        """``state`` in the dtype that travels."""
        return state.to(self.message_dtype)

    def buffer(self, like: Tensor, elements: int) -> Tensor:
        """Return an empty message of ``elements``."""
        return like.new_empty(elements, dtype=self.message_dtype)

    def packed(self, parts: Sequence[Tensor]) -> Tensor:
        """One message of several states or slices."""
        return self.message(parts[0] if len(parts) == 1 else torch.cat(list(parts)))

    def unpacked(self, nodes: Sequence[int], message: Tensor) -> dict[int, Tensor]:
        """Return the parts of a message by node."""
        if len(nodes) == 1:
            return {nodes[0]: message}
        return dict(zip(nodes, message.chunk(len(nodes)), strict=True))

    def expected(self, like: Tensor, counts: Sequence[tuple[int, int]]) -> list[Message]:
        """Messages to receive, from ``(peer, elements)``; peers that send nothing are left out."""
        sizes = [count for _, count in counts]
        buffers = self.buffer(like, sum(sizes)).split(sizes) if sizes else ()
        pairs = zip(counts, buffers, strict=True)
        return [Message(peer, buffer) for (peer, count), buffer in pairs if count]


def _window_products(values_NB: Tensor) -> list[Tensor]:
    """By level, the product over the ``2**level`` rows that end with each (or all before it)."""
    tables, width = [values_NB], 1
    while width < values_NB.shape[0]:
        products = tables[-1].clone()
        products[width:] *= tables[-1][:-width]
        tables.append(products)
        width *= 2
    return tables


def _combine(
    keep: float, factor: Tensor | None, earlier: Tensor, later: Tensor, out: Tensor | None
) -> Tensor:
    if keep == 0.0:
        return later if out is None else out.copy_(later)
    if earlier.dtype != later.dtype:
        earlier = earlier.to(later.dtype)
    if factor is not None:
        return torch.addcmul(later, earlier, factor.to(later.dtype), value=keep, out=out)
    return torch.add(later, earlier, alpha=keep, out=out)


def span_path(ranks: int, order: SequenceOrder, direction: Direction) -> list[list[int]]:
    """Spans of each node, both in the order of the scan: REVERSE starts at the row's last span."""
    spans = list(range(total_spans(ranks, order)))
    if direction is Direction.REVERSE:
        spans.reverse()
    path: list[list[int]] = []
    for span in spans:
        owner = rank_of_span(span, ranks, order)
        if path and rank_of_span(path[-1][-1], ranks, order) == owner:
            path[-1].append(span)
        else:
            path.append([span])
    return path


def make_route(
    keeps_SB: Tensor,
    factors_SB: Tensor | None,
    *,
    ranks: int,
    order: SequenceOrder,
    direction: Direction,
) -> Route:
    """Return the path of nodes with their keeps, from those of every span in sequence order."""
    path = span_path(ranks, order, direction)

    def of_nodes(values_SB: Tensor) -> Tensor:
        # Spans by slices of one tensor: an index of integers would be uploaded.
        return torch.stack([torch.stack([values_SB[s] for s in node]).prod(dim=0) for node in path])

    owners = tuple(rank_of_span(node[0], ranks, order) for node in path)
    return Route(owners, of_nodes(keeps_SB), None if factors_SB is None else of_nodes(factors_SB))


def split(elements: int, parts: int) -> list[tuple[int, int]]:
    """``elements`` cut into ``parts`` half-open ranges whose sizes differ by one at most."""
    size, longer = divmod(elements, parts)
    edges = [part * size + min(part, longer) for part in range(parts + 1)]
    return list(pairwise(edges))
