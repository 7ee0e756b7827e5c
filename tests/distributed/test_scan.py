"""The scan on real gloo ranks: equal to its definition in fp64, outputs and gradients."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.cost import traffic
from megatron_ttt.parallel.layout import spans_of_rank
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder
from tests.distributed.scan_cases import (
    Case,
    count_traffic,
    factors_of,
    make_problem,
    scan_and_gradient,
    scan_by_definition,
    scan_handed_in_late,
    scan_on_subgroups,
    scan_poisoned,
    scan_with_factors,
    scans_in_flight,
)
from tests.pool import RankPool

EVERY = list(product(SequenceOrder, ALGORITHMS))
RANKS = list(range(1, 9))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1.0)
    assert error.item() < tolerance


def check_case(case: Case, per_rank: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    ranks = len(per_rank)
    problem = make_problem(case, ranks)
    states = problem.states_SBM.clone().requires_grad_()
    expected = scan_by_definition(states, problem.keeps_SB) + 0 * states  # in the graph at 1 span
    expected.backward(problem.gradient_SBM)
    assert states.grad is not None
    for rank, (carries, gradient) in enumerate(per_rank):
        held = spans_of_rank(rank, ranks, case.order)
        assert carries.dtype == gradient.dtype == case.state_dtype
        assert_close(carries, expected.detach()[held], tolerance)
        assert_close(gradient, states.grad[held], tolerance)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_keeps_that_depend_on_data(pool: RankPool, ranks: int) -> None:
    """Factors are shared between ranks and multiply the keeps, in both directions."""
    cases = [Case(order, algorithm, rows=3, elements=35) for order, algorithm in EVERY]
    results = pool.run(scan_with_factors, cases, ranks=ranks)
    for index, case in enumerate(cases):
        problem = make_problem(case, ranks)
        keeps_SB = problem.keeps_SB * factors_of(problem)
        right = scan_by_definition(problem.states_SBM, keeps_SB)
        left = scan_by_definition(problem.gradient_SBM, keeps_SB, Direction.REVERSE)
        for rank in range(ranks):
            held = spans_of_rank(rank, ranks, case.order)
            found_right, found_left = results[rank][index]
            assert_close(found_right, right[held], 1e-12)
            assert_close(found_left, left[held], 1e-12)


@pytest.mark.parametrize("ranks", RANKS)
def test_parity_with_the_definition(pool: RankPool, ranks: int) -> None:
    """Both orders, all algorithms, random keeps, sizes that neither ranks nor blocks divide."""
    cases = [
        Case(order, algorithm, rows, elements, seed=seed)
        for order, algorithm in EVERY
        for seed, (rows, elements) in enumerate([(1, 40), (2, 37), (3, 5), (1, 1), (2, 2053)])
    ]
    results = pool.run(scan_and_gradient, cases, ranks=ranks)
    for index, case in enumerate(cases):
        check_case(case, [result[index] for result in results], tolerance=1e-13)


@pytest.mark.parametrize(
    ("state_dtype", "comm_dtype", "tolerance"),
    [
        (torch.float32, None, 1e-6),
        (torch.float32, torch.bfloat16, 2e-2),  # 8 bits of mantissa, once a hop
        (torch.float64, torch.float32, 1e-6),
    ],
)
@pytest.mark.parametrize("ranks", [3, 4, 7])
def test_parity_in_less_precision(
    pool: RankPool,
    ranks: int,
    state_dtype: torch.dtype,
    comm_dtype: torch.dtype | None,
    tolerance: float,
) -> None:
    cases = [Case(order, algorithm, 2, 5003, state_dtype, comm_dtype) for order, algorithm in EVERY]
    results = pool.run(scan_and_gradient, cases, ranks=ranks)
    for index, case in enumerate(cases):
        check_case(case, [result[index] for result in results], tolerance)


@pytest.mark.parametrize(("order", "algorithm"), EVERY)
def test_a_keep_of_zero_stops_infinities(
    pool: RankPool, order: SequenceOrder, algorithm: ScanAlgorithm
) -> None:
    case = Case(order, algorithm, rows=3, elements=11)
    ranks = 4
    problem = make_problem(case, ranks)
    before_reset = torch.roll(problem.keeps_SB == 0, -1, dims=0)
    before_reset[-1] = False
    states_SBM = problem.states_SBM.clone()
    states_SBM[before_reset] = torch.inf
    expected = scan_by_definition(states_SBM, problem.keeps_SB)
    assert before_reset.any() and expected.isinf().any() and expected.isfinite().any()
    for rank, carries in enumerate(pool.run(scan_poisoned, case, ranks=ranks)):
        torch.testing.assert_close(carries, expected[spans_of_rank(rank, ranks, order)])


@pytest.mark.parametrize("order", SequenceOrder)
def test_subgroups_of_the_world(pool: RankPool, order: SequenceOrder) -> None:
    for algorithm in ALGORITHMS:
        case = Case(order, algorithm)
        results = pool.run(scan_on_subgroups, case, ranks=6)
        for parity in range(2):
            check_case(case, [result[0] for result in results[parity::2]], tolerance=1e-13)


@pytest.mark.parametrize("order", SequenceOrder)
def test_summaries_handed_in_late(pool: RankPool, order: SequenceOrder) -> None:
    for algorithm in ALGORITHMS:
        case = Case(order, algorithm)
        problem = make_problem(case, 3)
        expected = scan_by_definition(problem.states_SBM, problem.keeps_SB)
        for rank, carries in enumerate(pool.run(scan_handed_in_late, case, ranks=3)):
            assert_close(carries, expected[spans_of_rank(rank, 3, order)], 1e-13)


def test_several_scans_in_flight(pool: RankPool) -> None:
    cases = [Case(order, algorithm, seed=index) for index, (order, algorithm) in enumerate(EVERY)]
    results = pool.run(scans_in_flight, cases, ranks=4)
    for index, case in enumerate(cases):
        problem = make_problem(case, 4)
        expected = scan_by_definition(problem.states_SBM, problem.keeps_SB)
        for rank, carries in enumerate(results):
            assert_close(carries[index], expected[spans_of_rank(rank, 4, case.order)], 1e-13)


@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_at_the_transport_are_the_models(pool: RankPool, ranks: int) -> None:
    cases = [
        Case(order, algorithm, 2, elements, torch.float32, comm_dtype)
        for order, algorithm in EVERY
        for elements, comm_dtype in [(840, None), (37, torch.bfloat16), (20011, None)]
    ]
    for rank, counts in enumerate(pool.run(count_traffic, cases, ranks=ranks)):
        runs = [(case, direction) for case in cases for direction in Direction]
        for (case, direction), (sent, messages, blocks) in zip(runs, counts, strict=True):
            elements, predicted = traffic(
                case.algorithm,
                rank=rank,
                ranks=ranks,
                order=case.order,
                elements=case.rows * case.elements,
                blocks=blocks,
                direction=direction,
            )
            size = (case.comm_dtype or case.state_dtype).itemsize
            assert (sent, messages) == (elements * size, predicted)
            state = case.rows * case.elements * size
            if case.algorithm is ScanAlgorithm.ring:
                assert sent <= 2 * state
            if case.algorithm is ScanAlgorithm.all_to_all and case.elements == 840:
                factor = 4 if case.order is SequenceOrder.zigzag else 2
                assert sent <= factor * state * (ranks - 1) // ranks
            if ranks == 2:
                assert sent <= state  # one state each way suffices
