"""What ranks of the scan tests run: module-level functions that the pool can import.

Shape suffixes: S all spans in sequence order, B batch rows, M elements of a row's state.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.layout import spans_of_rank, total_spans
from megatron_ttt.parallel.scan import ScanGroup, SpanExchange
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


@dataclass(frozen=True)
class Case:
    order: SequenceOrder
    algorithm: ScanAlgorithm
    rows: int = 2
    elements: int = 37
    state_dtype: torch.dtype = torch.float64
    comm_dtype: torch.dtype | None = None
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """States, keeps and the gradient of the carries; all spans, in sequence order."""

    states_SBM: Tensor
    keeps_SB: Tensor
    gradient_SBM: Tensor


def make_problem(case: Case, ranks: int) -> Problem:
    """Random states; a third of the keeps 0, a third 1, the others fractional."""
    generator = torch.Generator().manual_seed(1000 * case.seed + ranks)
    spans = total_spans(ranks, case.order)
    shape = (spans, case.rows, case.elements)
    keeps_SB = torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    keeps_SB = torch.where(keeps_SB < 1 / 3, 0.0, torch.where(keeps_SB > 2 / 3, 1.0, keeps_SB))
    states_SBM, gradient_SBM = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return Problem(states_SBM, keeps_SB, gradient_SBM)


def scan_by_definition(
    states_SBM: Tensor, keeps_SB: Tensor, direction: Direction = Direction.FORWARD
) -> Tensor:
    """The recurrence, span by span."""
    spans = range(states_SBM.shape[0])
    carry_BM = torch.zeros_like(states_SBM[0])
    carries_SBM = [carry_BM] * len(spans)
    for span in spans if direction is Direction.FORWARD else reversed(spans):
        carries_SBM[span] = carry_BM
        keep_B1 = keeps_SB[span].unsqueeze(-1)
        kept_BM = torch.where(keep_B1 == 0, torch.zeros_like(carry_BM), keep_B1 * carry_BM)
        carry_BM = kept_BM + states_SBM[span]
    return torch.stack(carries_SBM)


def scan_and_gradient(rank: int, ranks: int, cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    """This rank's carries and the gradient of its states, per case."""
    group = ScanGroup(dist.group.WORLD)
    results = []
    for case in cases:
        problem = make_problem(case, ranks)
        held = spans_of_rank(rank, ranks, case.order)
        results.append(_both_directions(case, problem, held, group))
    return results


def _both_directions(
    case: Case,
    problem: Problem,
    held: list[int],
    group: object,
    factors_SB: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's carries, and the gradient of its states for the problem's gradient of them.

    ``factors_SB``: all spans'; the rank shares its own.
    """
    exchange = SpanExchange(
        problem.keeps_SB,
        order=case.order,
        group=group,
        algorithm=case.algorithm,
        comm_dtype=case.comm_dtype,
    )
    shared = None if factors_SB is None else exchange.share_factors(factors_SB[held])
    carries, gradients = (
        exchange.start(
            states[held].to(case.state_dtype), direction=direction, factors_SB=shared
        ).wait()
        for direction, states in (
            (Direction.FORWARD, problem.states_SBM),
            (Direction.REVERSE, problem.gradient_SBM),
        )
    )
    return carries, gradients


def scan_poisoned(rank: int, ranks: int, case: Case) -> Tensor:
    """Infinities in front of every keep of 0 and NaN as the last span's summary."""
    problem = make_problem(case, ranks)
    states_SBM = problem.states_SBM.clone()
    before_reset = torch.roll(problem.keeps_SB == 0, -1, dims=0)
    before_reset[-1] = False
    states_SBM[before_reset] = torch.inf
    states_SBM[-1] = torch.nan
    exchange = SpanExchange(
        problem.keeps_SB, order=case.order, group=dist.group.WORLD, algorithm=case.algorithm
    )
    held = spans_of_rank(rank, ranks, case.order)
    return exchange.start(states_SBM[held], direction=Direction.FORWARD).wait()


def scan_with_factors(rank: int, ranks: int, cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    """Carries from the left and from the right; each rank knows its own factors only."""
    group = ScanGroup(dist.group.WORLD)
    results = []
    for case in cases:
        problem = make_problem(case, ranks)
        held = spans_of_rank(rank, ranks, case.order)
        results.append(_both_directions(case, problem, held, group, factors_of(problem)))
    return results


def factors_of(problem: Problem) -> Tensor:
    """A factor in (0.5, 1.5) for every span and row, ``[S, B]`` in sequence order."""
    return problem.states_SBM[..., 0].sigmoid() + 0.5


def scan_on_subgroups(rank: int, ranks: int, case: Case) -> list[tuple[Tensor, Tensor]]:
    """Even and odd ranks scan apart, at the same time, with gradients."""
    groups = [dist.new_group(list(range(parity, ranks, 2))) for parity in range(2)]
    group = groups[rank % 2]
    problem = make_problem(case, dist.get_world_size(group))
    held = spans_of_rank(dist.get_rank(group), dist.get_world_size(group), case.order)
    return [_both_directions(case, problem, held, group)]


def count_traffic(rank: int, ranks: int, cases: list[Case]) -> list[tuple[int, int, int]]:
    """Bytes, messages and blocks of each case, as the transport counted them."""
    counts = []
    group = ScanGroup(dist.group.WORLD)
    for case in cases:
        for direction in Direction:
            problem = make_problem(case, ranks)
            exchange = SpanExchange(
                problem.keeps_SB,
                order=case.order,
                group=group,
                algorithm=case.algorithm,
                comm_dtype=case.comm_dtype,
            )
            states = problem.states_SBM[spans_of_rank(rank, ranks, case.order)]
            pending = exchange.start(states.to(case.state_dtype), direction=direction)
            pending.wait()
            record = pending.record
            counts.append((record.bytes_sent, record.messages_sent, record.blocks))
    return counts


def scans_in_flight(rank: int, ranks: int, cases: list[Case]) -> list[Tensor]:
    """Start every scan, do other collectives meanwhile, then wait in the opposite order."""
    group = ScanGroup(dist.group.WORLD)
    pending = []
    for case in cases:
        problem = make_problem(case, ranks)
        exchange = SpanExchange(
            problem.keeps_SB, order=case.order, group=group, algorithm=case.algorithm
        )
        states = problem.states_SBM[spans_of_rank(rank, ranks, case.order)]
        pending.append(exchange.start(states, direction=Direction.FORWARD))
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [ranks] * 3
    return [handle.wait() for handle in reversed(pending)][::-1]


def scan_handed_in_late(rank: int, ranks: int, case: Case) -> Tensor:
    """Summaries are provided one by one after the scan has been opened, last span first."""
    problem = make_problem(case, ranks)
    exchange = SpanExchange(
        problem.keeps_SB, order=case.order, group=dist.group.WORLD, algorithm=case.algorithm
    )
    states = problem.states_SBM[spans_of_rank(rank, ranks, case.order)]
    needed = exchange.needs_summary(Direction.FORWARD)
    pending = exchange.open(torch.empty_like(states), direction=Direction.FORWARD)
    for span in reversed(range(len(needed))):
        if needed[span]:
            pending.provide(span, states[span])
    return pending.wait()
