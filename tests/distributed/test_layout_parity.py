"""Every layout trains the same model: gradients at step 1, twenty losses, gradient norms.

Bounds: 1e-4 relative norm for every parameter's gradient before
clipping, 2e-5 relative for each of 20 losses, 5e-4 for gradient norms, in fp32. Loss curves alone
prove little: with AdamW a gradient twice too large moves them by less than 1e-4. So faults that
are the typical mistakes are planted, and must be found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import Config, Precision, Recompute, Toggle
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.rule import (
    Clip,
    ClipMode,
    Conv,
    Normalize,
    TargetSource,
    WriteKind,
    WriteSettings,
)
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder
from megatron_ttt.training.loop import Trainer
from tests.distributed.training_runs import (
    Fault,
    RunReport,
    no_fault,
    run_training,
    tiny_config,
    whole_gradients,
)
from tests.pool import RankPool

STEPS = 20
GRADIENT_BOUND, LOSS_BOUND, NORM_BOUND = 1e-4, 2e-5, 5e-4

FULL = {"recompute": Recompute.full}
SELECTIVE = {"recompute": Recompute.selective, "recompute_modules": ("core_attn", "mlp")}
PIECES = {"loss_tokens": 37}  # pieces that nothing divides
CONTIGUOUS = {"cp_order": SequenceOrder.contiguous}
DENSE = {"packed": False}
EMBEDDINGS = {
    "target": TargetSource.input_embeddings,
    "normalize": Normalize.key_energy,
    "eta": 0.05,
}

WRITES = {
    "gated": WriteSettings(WriteKind.gated),
    "bounded": WriteSettings(WriteKind.bounded, 0.25),
}

# What a chunk's targets are made of and what its write is divided by, eta in its units.
TARGETS = {
    "next_token": {"conv": Conv.next_token, "normalize": Normalize.key_energy, "eta": 0.05},
    "causal": {"conv": Conv.causal, "kernel_size": 4},
    "kernel 9, beyond a chunk": {"kernel_size": 9},
    "spectral": {"normalize": Normalize.spectral, "eta": 0.08},
    "spectral, bounded": {
        "normalize": Normalize.spectral,
        "eta": 0.08,
        "write": WriteSettings(WriteKind.bounded, 0.25),
    },
}

# What a layout is; the rest of a case says which model is trained.
LAYOUT_KEYS = {
    *("tp", "cp", "pp", "sequence_parallel", "cp_order", "scan"),
    *("recompute", "recompute_modules", "loss_tokens", "distributed_optimizer"),
}

CASES = [
    # ranks, layout and variant; the one-rank run of the same variant is what it must equal
    (2, {"tp": 2}),
    (2, {"tp": 2, **DENSE, **FULL}),
    (2, {"tp": 2, "sequence_parallel": Toggle.off}),
    (2, {"tp": 2, "sequence_parallel": Toggle.off, **DENSE, **SELECTIVE}),
    (2, {"tp": 2, **EMBEDDINGS, **PIECES}),
    (2, {"tp": 2, "sequence_parallel": Toggle.off, **EMBEDDINGS, **FULL, **PIECES}),
    (2, {"cp": 2}),
    (2, {"cp": 2, **DENSE, **FULL, **PIECES}),
    (2, {"cp": 2, **EMBEDDINGS, **SELECTIVE}),
    (2, {"cp": 2, **CONTIGUOUS}),
    (2, {"cp": 2, **CONTIGUOUS, **DENSE}),
    (4, {"cp": 4}),
    (4, {"cp": 4, **DENSE}),
    (4, {"cp": 4, **CONTIGUOUS, **EMBEDDINGS}),
    (2, {"pp": 2}),
    (2, {"pp": 2, **DENSE, **FULL}),
    (2, {"pp": 2, "tied": False, **PIECES}),
    (2, {}),  # dp = 2
    (2, {**DENSE}),
    (2, {**EMBEDDINGS, **FULL}),
    (2, {"distributed_optimizer": False}),
    (4, {"tp": 2, "cp": 2}),
    (4, {"tp": 2, "cp": 2, **DENSE, **SELECTIVE, **PIECES}),
    (4, {"tp": 2, "cp": 2, **EMBEDDINGS}),
    (4, {"pp": 2, "cp": 2}),
    (4, {"pp": 2, "cp": 2, **DENSE, **FULL}),
    (4, {"tp": 2, "pp": 2, **PIECES}),
    (4, {"tp": 2, "pp": 2, **DENSE, **SELECTIVE}),
    (4, {"cp": 2, **FULL}),  # cp = 2, dp = 2
]


def case_id(case: tuple[int, dict[str, Any]]) -> str:
    ranks, changes = case
    words = [f"{key}={getattr(value, 'value', value)}" for key, value in changes.items()]
    return "-".join([f"{ranks} ranks", *words])


class Baselines:
    """One-rank runs, each made once."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool
        self._known: dict[str, tuple[RunReport, dict[str, Tensor]]] = {}

    def of(self, changes: dict[str, Any]) -> tuple[RunReport, dict[str, Tensor]]:
        """The one-rank run of a variant: layout and recomputation do not change what it is."""
        variant = {key: value for key, value in changes.items() if key not in LAYOUT_KEYS}
        key = repr(sorted(variant.items()))
        if key not in self._known:
            args = (run_training, configure(variant), STEPS)
            reports = self._pool.run(*args, ranks=1, timeout=120)
            self._known[key] = reports[0], whole_gradients(reports)
        return self._known[key]


@pytest.fixture(scope="module")
def baselines(pool: RankPool) -> Baselines:
    return Baselines(pool)


def configure(changes: dict[str, Any]) -> Config:
    """A tiny configuration, with keys of the update rule, the optimizer and the run besides."""
    changes = dict(changes)
    fast = {k: changes.pop(k) for k in ("decay", "clip", "conv", "kernel_size") if k in changes}
    train = {k: changes.pop(k) for k in ("eta_warmup_steps",) if k in changes}
    config = tiny_config(**changes)
    return replace(
        config,
        ttt=replace(config.ttt, **fast),
        train=replace(config.train, **train),
    )


def compare(
    pool: RankPool,
    baselines: Baselines,
    ranks: int,
    changes: dict[str, Any],
    *,
    fault: Fault = no_fault,
    steps: int = STEPS,
) -> list[str]:
    """Run a layout; what differs from one rank by more than the bounds, in words."""
    one, one_gradients = baselines.of(changes)
    alive = one.ratios[0].values()
    assert min(alive) > 0.05 and max(alive) < 0.3, f"update ratios at the start: {alive}"
    args = (configure(changes), steps, None, fault)
    reports = pool.run(run_training, *args, ranks=ranks, timeout=150)
    gradients = whole_gradients(reports)
    assert gradients.keys() == one_gradients.keys()
    wrong = []
    for name, expected in one_gradients.items():
        error = float((gradients[name] - expected).norm() / expected.norm())
        if not error < GRADIENT_BOUND:
            wrong.append(f"gradient of {name}: {error:.1e}")
    for report in reports:
        pairs = zip(report.losses, one.losses[:steps], strict=True)
        loss_error = max(abs(a / b - 1) for a, b in pairs)
        norm_pairs = zip(report.grad_norms, one.grad_norms[:steps], strict=True)
        norm_error = max(abs(a / b - 1) for a, b in norm_pairs)
        if not loss_error < LOSS_BOUND:
            wrong.append(f"losses: {loss_error:.1e}")
        if not norm_error < NORM_BOUND:
            wrong.append(f"gradient norms: {norm_error:.1e}")
        for step, (mine, whole) in enumerate(zip(report.ratios, one.ratios, strict=False)):
            for layer, ratio in whole.items():
                if abs(mine[layer] / ratio - 1) > 1e-3:
                    wrong.append(f"update ratio of layer {layer}, step {step}")
    return wrong


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_layout_equals_one_rank(
    pool: RankPool, baselines: Baselines, case: tuple[int, dict[str, Any]]
) -> None:
    assert compare(pool, baselines, *case) == []


@pytest.mark.parametrize("scan", ALGORITHMS, ids=lambda scan: scan.value)
def test_every_scan_algorithm_equals_one_rank(
    pool: RankPool, baselines: Baselines, scan: ScanAlgorithm
) -> None:
    """Documents start on and off the edges of chunks (8), spans and ranks (16) in this text."""
    assert compare(pool, baselines, 4, {"cp": 4, "scan": scan}) == []
    contiguous = {"cp": 4, "scan": scan, **CONTIGUOUS}
    assert compare(pool, baselines, 4, contiguous, steps=3) == []


@pytest.mark.parametrize(
    "case",
    [
        (4, {"tp": 2, "cp": 2}),
        (4, {"cp": 4, **CONTIGUOUS, **FULL}),
        (2, {"tp": 2, "sequence_parallel": Toggle.off, **EMBEDDINGS}),
        (4, {"pp": 2, "cp": 2, **DENSE, **SELECTIVE}),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_rules_equal_one_rank(
    pool: RankPool,
    baselines: Baselines,
    write: WriteSettings,
    case: tuple[int, dict[str, Any]],
) -> None:
    ranks, layout = case
    if EMBEDDINGS.items() <= layout.items() and write.kind is WriteKind.bounded:
        write = replace(write, bound=0.3)
    assert compare(pool, baselines, ranks, {**layout, "write": write}, steps=3) == []


@pytest.mark.parametrize(
    "case",
    [
        (4, {"tp": 2, "cp": 2, **PIECES}),
        (2, {"tp": 2, "sequence_parallel": Toggle.off, **SELECTIVE}),
        (4, {"pp": 2, "cp": 2, **DENSE, **FULL}),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_targets_and_scales_equal_one_rank(
    pool: RankPool,
    baselines: Baselines,
    target: dict[str, Any],
    case: tuple[int, dict[str, Any]],
) -> None:
    ranks, layout = case
    assert compare(pool, baselines, ranks, {**layout, **target}, steps=3) == []


@pytest.mark.parametrize(
    "case",
    [
        (4, {"tp": 2, "cp": 2}),
        (4, {"pp": 2, "cp": 2, **FULL}),
        (2, {"distributed_optimizer": False}),
        (2, {}),  # dp = 2: the optimizer's groups of parameters are shared out
    ],
    ids=case_id,
)
def test_rates_of_the_target_equal_one_rank(
    pool: RankPool, baselines: Baselines, case: tuple[int, dict[str, Any]]
) -> None:
    """A learning rate of its own, and an eta that is still rising when this ends."""
    ranks, layout = case
    changes = {**layout, "target_lr_factor": 4.0, "eta_warmup_steps": 3, "eta": 0.012}
    assert compare(pool, baselines, ranks, changes, steps=5) == []


def test_decay_and_clip_equal_one_rank(pool: RankPool, baselines: Baselines) -> None:
    changes = {"decay": 0.9, "clip": Clip(ClipMode.relative, 0.05), "eta": 0.02}
    assert compare(pool, baselines, 4, {"tp": 2, "cp": 2, **changes}, steps=5) == []


def test_bf16_with_fp32_master_weights_follows_fp32(pool: RankPool, baselines: Baselines) -> None:
    """The precision of GPUs, on the CPU: losses within bf16's rounding, weights kept in fp32."""
    one, _ = baselines.of({})
    config = configure({"tp": 2, "cp": 2})
    config = replace(config, train=replace(config.train, precision=Precision.bf16))
    reports = pool.run(run_training, config, 5, ranks=4, timeout=100)
    assert reports[0].losses != one.losses[:5]
    assert reports[0].losses == pytest.approx(one.losses[:5], rel=1e-2)
    assert reports[0].grad_norms == pytest.approx(one.grad_norms[:5], rel=2e-2)


def test_recomputation_repeats_no_scan(pool: RankPool) -> None:
    for changes in ({}, FULL, SELECTIVE):
        config = configure({"cp": 2, **changes})
        reports = pool.run(run_training, config, 2, ranks=2, timeout=100)
        # Two fast layers, two micro-batches, one scan forward and one backward.
        assert [report.scans for report in reports] == [[8, 8], [8, 8]]


def _double(trainer: Trainer, ending: str) -> Iterator[None]:
    handles = [
        parameter.register_hook(lambda gradient: 2 * gradient)
        for name, parameter in trainer.stage.named_parameters()
        if name.endswith(ending) and "0.mlp" in name
    ]
    assert handles
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def doubled_conv(trainer: Trainer) -> Iterator[None]:
    yield from _double(trainer, "ttt_conv.weight")


@contextmanager
def doubled_projection(trainer: Trainer) -> Iterator[None]:
    yield from _double(trainer, "ttt_proj.weight")


@contextmanager
def doubled_slow_weight(trainer: Trainer) -> Iterator[None]:
    yield from _double(trainer, "linear_fc2.weight")


@contextmanager
def scan_backward_cut(trainer: Trainer) -> Iterator[None]:
    from megatron_ttt.fast_weights.sweeps import Direction
    from megatron_ttt.parallel.scan import SpanExchange

    whole = SpanExchange.open

    class Nothing:
        def __init__(self, like: Tensor) -> None:
            self.like = like

        def provide(self, span: int, summary: Tensor) -> None:
            pass

        def wait(self) -> Tensor:
            return torch.zeros_like(self.like)

    def cut(self: SpanExchange, like: Tensor, *, direction: Direction, **factors: Any) -> Any:
        if direction is Direction.REVERSE:
            return Nothing(like)
        return whole(self, like, direction=direction, **factors)

    with mock.patch.object(SpanExchange, "open", cut):
        yield


@pytest.mark.parametrize(
    ("fault", "layout", "named"),
    [
        (doubled_conv, {"cp": 2}, "ttt_conv"),
        (doubled_projection, {"tp": 2}, "ttt_proj"),
        (doubled_slow_weight, {"pp": 2}, "linear_fc2"),
        (scan_backward_cut, {"cp": 2}, "ttt_"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_faults_are_found(
    pool: RankPool, baselines: Baselines, fault: Fault, layout: dict[str, Any], named: str
) -> None:
    wrong = compare(pool, baselines, 2, layout, fault=fault, steps=1)
    assert any(line.startswith("gradient of") and named in line for line in wrong), wrong
