"""The real programs on simulated ranks: right at any P, and as fast as the cost model says."""

from itertools import chain, product

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import Direction
from megatron_ttt.parallel.cost import GPU_CLUSTER, Link, Topology, best_blocks, predict, traffic
from megatron_ttt.parallel.layout import spans_of_rank, total_spans
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder
from tests.simulator import Simulation, simulate

EVERY = list(product(SequenceOrder, ALGORITHMS))
FLAT = Topology(1 << 20, Link(1e-5, 1e-9), Link(1e-5, 1e-9), 1e-10)
SINGLE = Topology(1, Link(1e-5, 1e-9), Link(2e-5, 2e-9))


def scan_by_definition(states_SBM: Tensor, keeps_SB: Tensor, direction: Direction) -> Tensor:
    order = range(len(states_SBM))
    carry_BM = torch.zeros_like(states_SBM[0])
    carries_SBM = torch.empty_like(states_SBM)
    for span in order if direction is Direction.FORWARD else reversed(order):
        carries_SBM[span] = carry_BM
        keep_B1 = keeps_SB[span].unsqueeze(-1)
        kept_BM = torch.where(keep_B1 == 0, torch.zeros_like(carry_BM), keep_B1 * carry_BM)
        carry_BM = kept_BM + states_SBM[span]
    return carries_SBM


def check_parity(
    ranks: int,
    order: SequenceOrder,
    algorithm: ScanAlgorithm,
    direction: Direction,
    *,
    rows: int = 2,
    elements: int = 19,
    blocks: int = 3,
    has_factors: bool = False,
) -> Simulation:
    """Against the definition, with NaN where no summary may be read."""
    spans = total_spans(ranks, order)
    generator = torch.Generator().manual_seed(ranks)
    states_SBM = torch.randn(spans, rows, elements, generator=generator, dtype=torch.float64)
    keeps_SB = torch.rand(spans, rows, generator=generator, dtype=torch.float64)
    keeps_SB = torch.where(keeps_SB < 0.2, 0.0, torch.where(keeps_SB > 0.5, 1.0, keeps_SB))
    factors_SB = torch.rand(spans, rows, generator=generator, dtype=torch.float64) + 0.5
    products_SB = keeps_SB * factors_SB if has_factors else keeps_SB
    expected_SBM = scan_by_definition(states_SBM, products_SB, direction)
    states_SBM[-1 if direction is Direction.FORWARD else 0] = torch.nan
    held = [spans_of_rank(rank, ranks, order) for rank in range(ranks)]
    simulation = simulate(
        [states_SBM[spans_here] for spans_here in held],
        keeps_SB,
        order=order,
        algorithm=algorithm,
        topology=GPU_CLUSTER,
        direction=direction,
        blocks=blocks,
        factors_SB=factors_SB if has_factors else None,
    )
    carries = torch.cat(simulation.carries_PSB)
    torch.testing.assert_close(carries, expected_SBM[list(chain(*held))], rtol=0, atol=1e-12)
    return simulation


@pytest.mark.parametrize(("order", "algorithm"), EVERY)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 33])
def test_parity_with_factors_that_depend_on_data(
    ranks: int, order: SequenceOrder, algorithm: ScanAlgorithm
) -> None:
    for direction in Direction:
        check_parity(ranks, order, algorithm, direction, has_factors=True)


@pytest.mark.parametrize(("order", "algorithm"), EVERY)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_parity_and_bytes(ranks: int, order: SequenceOrder, algorithm: ScanAlgorithm) -> None:
    for direction in Direction:
        simulation = check_parity(ranks, order, algorithm, direction)
        for rank in range(ranks):
            elements, messages = traffic(
                algorithm,
                rank=rank,
                ranks=ranks,
                order=order,
                elements=2 * 19,
                blocks=3,
                direction=direction,
            )
            assert simulation.bytes_sent[rank] == 8 * elements
            assert simulation.messages_sent[rank] == messages


@pytest.mark.parametrize(
    ("order", "algorithm"),
    [pair for pair in EVERY if pair[1] in (ScanAlgorithm.doubling, ScanAlgorithm.ring)],
)
def test_parity_of_a_thousand_ranks(order: SequenceOrder, algorithm: ScanAlgorithm) -> None:
    check_parity(1000, order, algorithm, Direction.FORWARD, rows=1, elements=11, blocks=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "algorithm", "elements"),
    [
        (SequenceOrder.contiguous, ScanAlgorithm.all_gather, 3),  # a million messages
        (SequenceOrder.zigzag, ScanAlgorithm.all_to_all, 60),  # only sixty ranks own a slice
    ],
)
def test_parity_of_a_thousand_ranks_that_all_talk(
    order: SequenceOrder, algorithm: ScanAlgorithm, elements: int
) -> None:
    check_parity(1000, order, algorithm, Direction.REVERSE, rows=1, elements=elements)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [ScanAlgorithm.doubling, ScanAlgorithm.ring])
def test_parity_of_4096_ranks(algorithm: ScanAlgorithm) -> None:
    check_parity(
        4096, SequenceOrder.zigzag, algorithm, Direction.FORWARD, rows=1, elements=4, blocks=2
    )


@pytest.mark.parametrize(("order", "algorithm"), EVERY)
@pytest.mark.parametrize("topology", [FLAT, SINGLE, GPU_CLUSTER], ids=["flat", "single", "gpu"])
def test_the_closed_forms_agree_with_the_clock(
    topology: Topology, order: SequenceOrder, algorithm: ScanAlgorithm
) -> None:
    """Within a third; the closed forms leave out how rounds of different links interleave."""
    for ranks, state_bytes in product([2, 5, 8, 32], [10_000, 10_000_000]):
        blocks = min(
            16, best_blocks(ranks=ranks, order=order, state_bytes=state_bytes, topology=topology)
        )
        spans = total_spans(ranks, order)
        simulation = simulate(
            [torch.ones(spans // ranks, 1, 4 * ranks) for _ in range(ranks)],
            torch.ones(spans, 1),
            order=order,
            algorithm=algorithm,
            topology=topology,
            blocks=blocks,
            nominal_bytes=state_bytes,
        )
        predicted = predict(
            algorithm,
            ranks=ranks,
            order=order,
            state_bytes=state_bytes,
            topology=topology,
            blocks=blocks,
        )
        assert 0.75 < simulation.seconds / predicted.seconds < 1.34


def test_one_message_takes_alpha_and_beta() -> None:
    """Two contiguous ranks, one state each way of the clock: exactly one message."""
    simulation = simulate(
        [torch.ones(1, 1, 250), torch.ones(1, 1, 250)],
        torch.ones(2, 1),
        order=SequenceOrder.contiguous,
        algorithm=ScanAlgorithm.ring,
        topology=SINGLE,
    )
    assert simulation.finished_s == pytest.approx([0.0, 2e-5 + 1000 * 2e-9])
    assert simulation.bytes_sent == [1000, 0]
