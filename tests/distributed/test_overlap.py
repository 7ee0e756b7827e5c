"""Weights that are gathered while the next forward runs are never used or saved half way.

With ``overlap_param_gather`` the optimizer leaves every rank with its own shard of the new
weights; the others' arrive when a module is called. A run with small buckets, so that many gathers
are under way at once, must equal, bit for bit, one that gathers before the next forward: losses,
gradient norms, update ratios, validation and the bytes of its checkpoint. Gathers run when they
are waited for and not before: a read that does not wait sees the weights of the step before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from megatron.core.distributed import param_and_grad_buffer

from megatron_ttt.checkpoints.manifest import read_manifest
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.checkpoints.run_files import step_folder
from megatron_ttt.config.schema import Config, Recompute, TTTMode
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import Normalize, TargetSource
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, Retention, SaveMode
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from tests.distributed.training_runs import (
    RunReport,
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    tiny_config,
    train_one,
)
from tests.pool import RankPool

STEPS = 3
BUCKET = 100  # parameters: nearly every weight travels on its own
EMBEDDINGS = {
    "target": TargetSource.input_embeddings,
    "normalize": Normalize.key_energy,
    "eta": 0.05,
}
CASES: list[tuple[int, TTTMode, dict[str, Any]]] = [
    (2, TTTMode.in_place, {}),
    (2, TTTMode.off, {}),
    (2, TTTMode.in_place, {**EMBEDDINGS, "recompute": Recompute.full}),
    (4, TTTMode.in_place, {"tp": 2, "recompute": Recompute.full}),
    (4, TTTMode.in_place, {"cp": 2, **EMBEDDINGS}),
    (4, TTTMode.in_place, {"pp": 2, "tied": False}),
]


@dataclass
class Late:
    """Gathers that were started together, and run when they are waited for."""

    started: Any
    gathers: list[Callable[[], Any]] = field(default_factory=list)

    def wait(self) -> None:
        for gather in self.gathers:
            gather()
        if not self.gathers:  # a reduction of gradients, already under way
            self.started.wait()


@contextmanager
def late_gathers() -> Iterator[None]:
    """Megatron's gathers of weights communicate as late as they may."""
    coalesce = param_and_grad_buffer._coalescing_manager
    gather = param_and_grad_buffer.dist_all_gather_func
    open_calls: list[Late] = []

    @contextmanager
    def late(group: Any, async_ops: bool = False) -> Iterator[Late]:
        with coalesce(group, async_ops=async_ops) as started:
            open_calls.append(Late(started))
            yield open_calls[-1]
        call = open_calls.pop()
        if call.gathers and not async_ops:
            call.wait()

    def note(output: Any, shard: Any, *, group: Any, async_op: bool) -> None:
        open_calls[-1].gathers.append(partial(gather, output, shard, group=group))

    with (
        mock.patch.object(param_and_grad_buffer, "_coalescing_manager", late),
        mock.patch.object(param_and_grad_buffer, "dist_all_gather_func", note),
    ):
        yield


@dataclass
class Seen:
    """All that a run lets its user see, of one rank."""

    report: RunReport
    validation: list[float]


def run_and_save(rank: int, ranks: int, config: Config, root: Path) -> Seen:
    report, validation = RunReport(), []
    with megatron_on_cpu(), late_gathers(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        for step in range(STEPS):
            batch = global_batch(config, step, packed=True)
            train_one(trainer, batch, report, keep_gradients=False)
            if step == 1:
                for mode in {config.ttt.mode: 0, TTTMode.off: 0}:
                    rows = micro_batches_of(global_batch(config, 99, packed=True), config, here)
                    validation.append(trainer.validation_loss(rows, mode))
        CheckpointSaver(
            root,
            trainer.state,
            ranks=here,
            mode=SaveMode.SYNCHRONOUS,
            facts={},
            retention=Retention(),
            report=lambda _: None,
        ).save(Progress(STEPS, 0, 0, 0))
    return Seen(report, validation)


def configure(changes: dict[str, Any], mode: TTTMode, *, gather_overlaps: bool) -> Config:
    config = tiny_config(
        **changes,
        overlap_grad_reduce=True,
        overlap_param_gather=gather_overlaps,
        bucket_size=BUCKET,
    )
    config.ttt.mode = mode
    config.train.global_batch_size = 8
    config.validation.batches = 1
    return config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_under_way_are_waited_for(
    pool: RankPool, tmp_path: Path, case: tuple[int, TTTMode, dict[str, Any]]
) -> None:
    ranks, mode, changes = case
    seen, records = {}, {}
    for overlaps in (False, True):
        root = tmp_path / str(overlaps)
        config = configure(changes, mode, gather_overlaps=overlaps)
        seen[overlaps] = pool.run(run_and_save, config, root, ranks=ranks, timeout=150)
        records[overlaps] = read_manifest(step_folder(root, STEPS)).files
        del records[overlaps][".metadata"]  # a pickle, whose length depends on shared strings
    assert seen[True] == seen[False]
    assert records[True] == records[False]
    losses = seen[True][0].report.losses
    assert losses[-1] < losses[0], "not training"
    if mode is TTTMode.in_place:
        ratios = [ratio for step in seen[True][0].report.ratios for ratio in step.values()]
        assert min(ratios) > 0.02, "fast weights not alive"
