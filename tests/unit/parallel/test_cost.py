"""The cost model: the table of bytes, what wins where, constants on disk."""

from pathlib import Path

import pytest

from megatron_ttt.parallel.cost import (
    CPU_MACHINE,
    GPU_CLUSTER,
    Link,
    Topology,
    best_blocks,
    choose,
    fit_link,
    load_topology,
    predict,
    save_topology,
    traffic,
)
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

ZIGZAG, CONTIGUOUS = SequenceOrder.zigzag, SequenceOrder.contiguous
STATE = 5040  # elements, divisible by every P used here


def sent_states(algorithm: ScanAlgorithm, order: SequenceOrder, ranks: int) -> list[float]:
    return [
        traffic(algorithm, rank=rank, ranks=ranks, order=order, elements=STATE)[0] / STATE
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [3, 4, 5, 7, 8])
def test_states_sent_by_inner_ranks(ranks: int) -> None:
    """An inner rank sends what the table of the documentation says, the ends of the row less."""
    inner = ranks // 2
    zigzag = {a: sent_states(a, ZIGZAG, ranks) for a in ALGORITHMS}
    contiguous = {a: sent_states(a, CONTIGUOUS, ranks) for a in ALGORITHMS}
    assert zigzag[ScanAlgorithm.all_gather][inner] == 2 * (ranks - 1)
    assert contiguous[ScanAlgorithm.all_gather][inner] == ranks - 1
    assert zigzag[ScanAlgorithm.ring] == [1.0] + [2.0] * (ranks - 2) + [1.0]
    assert contiguous[ScanAlgorithm.ring] == [1.0] * (ranks - 1) + [0.0]
    # Nothing enters the first node, and rank P-1 needs one carry for its two neighbouring spans.
    assert zigzag[ScanAlgorithm.all_to_all][inner] == pytest.approx((4 * (ranks - 1) - 2) / ranks)
    assert contiguous[ScanAlgorithm.all_to_all][inner] == pytest.approx(
        (2 * (ranks - 1) - 1) / ranks
    )


def test_doubling_sends_a_state_per_node_and_round() -> None:
    assert sent_states(ScanAlgorithm.doubling, CONTIGUOUS, 8) == [3, 3, 3, 3, 2, 2, 1, 0]
    mean = sum(sent_states(ScanAlgorithm.doubling, ZIGZAG, 64)) / 64
    assert 0.8 * 2 * 6 < mean < 2 * 6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", SequenceOrder)
def test_one_rank_is_free(algorithm: ScanAlgorithm, order: SequenceOrder) -> None:
    prediction = predict(algorithm, ranks=1, order=order, state_bytes=1000, topology=GPU_CLUSTER)
    assert (prediction.seconds, prediction.bytes_sent, prediction.messages) == (0, 0, 0)


def test_what_wins_where() -> None:
    """Small states: few rounds. Large states: few bytes."""
    small = choose(ranks=64, order=ZIGZAG, state_bytes=1000, topology=GPU_CLUSTER)
    assert small.algorithm is ScanAlgorithm.doubling
    large = choose(ranks=64, order=ZIGZAG, state_bytes=400_000_000, topology=GPU_CLUSTER)
    assert large.algorithm is ScanAlgorithm.ring and large.blocks > 8
    gathered = predict(
        ScanAlgorithm.all_gather,
        ranks=64,
        order=ZIGZAG,
        state_bytes=400_000_000,
        topology=GPU_CLUSTER,
    )
    assert gathered.seconds > 10 * large.seconds
    assert choose(ranks=8, order=ZIGZAG, state_bytes=25 << 20, topology=CPU_MACHINE).bytes_sent <= (
        2 * (25 << 20)
    )


@pytest.mark.parametrize("ranks", [2, 16, 256, 4096])
@pytest.mark.parametrize("order", SequenceOrder)
def test_auto_is_the_least_of_the_four(ranks: int, order: SequenceOrder) -> None:
    for state_bytes in (1_000, 1_000_000, 100_000_000):
        situation = {"order": order, "state_bytes": state_bytes, "topology": GPU_CLUSTER}
        seconds = [predict(a, ranks=ranks, **situation).seconds for a in ALGORITHMS]
        assert choose(ranks=ranks, **situation).seconds == min(seconds)


def test_more_blocks_for_larger_states_and_shorter_latency() -> None:
    blocks = [
        best_blocks(ranks=16, order=ZIGZAG, state_bytes=size, topology=GPU_CLUSTER)
        for size in (1_000, 10_000_000, 400_000_000)
    ]
    assert blocks[0] == 1 and blocks[0] < blocks[1] < blocks[2]


def test_lanes_bound_the_time_from_below() -> None:
    link = Link(1e-5, 1e-9)
    free = Topology(8, link, link)
    crowded = Topology(8, link, link, lanes=2)
    situation = {"ranks": 8, "order": ZIGZAG, "state_bytes": 1_000_000}
    for algorithm in ALGORITHMS:
        alone = predict(algorithm, topology=free, blocks=4, **situation)
        shared = predict(algorithm, topology=crowded, blocks=4, **situation)
        assert shared.seconds >= alone.seconds
        sent = sum(
            traffic(algorithm, rank=r, ranks=8, order=ZIGZAG, elements=1_000_000)[0]
            for r in range(8)
        )
        assert shared.seconds >= 0.8 * sent * 1e-9 / 2


def test_a_link_is_recovered_from_its_times() -> None:
    sizes = [1_000, 100_000, 10_000_000]
    link = fit_link(sizes, [3e-5 + 2e-9 * size for size in sizes])
    assert link.alpha_s == pytest.approx(3e-5) and link.beta_s_per_byte == pytest.approx(2e-9)
    assert fit_link([1_000, 2_000], [1e-3, 2.5e-3]).alpha_s == 0.0
    with pytest.raises(ValueError, match="do not tell alpha from beta"):
        fit_link([1_000, 1_000], [1e-3, 1e-3])


def test_constants_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    save_topology(CPU_MACHINE, path)
    assert load_topology(path) == CPU_MACHINE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not the constants of a topology"),
        ('{"intra": {"alpha_s": 1, "beta_s_per_byte": 1}}', "not the constants of a topology"),
        (
            '{"island": 0, "intra": {"alpha_s": 1, "beta_s_per_byte": 1}, '
            '"inter": {"alpha_s": 1, "beta_s_per_byte": 1}}',
            "must be positive",
        ),
        (
            '{"island": 8, "intra": {"alpha_s": -1, "beta_s_per_byte": 1}, '
            '"inter": {"alpha_s": 1, "beta_s_per_byte": 1}}',
            "not negative",
        ),
    ],
)
def test_wrong_constants_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "constants.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_topology(path)
    assert str(path) in str(caught.value)


def test_a_message_of_a_gpu_costs_what_pythons_batched_calls_cost() -> None:
    """About 80 us by their host code; 12, the network's alone, let `auto` choose many messages."""
    assert 50e-6 < GPU_CLUSTER.intra.alpha_s <= GPU_CLUSTER.inter.alpha_s < 200e-6
