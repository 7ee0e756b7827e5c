"""Memory of a run on each pipeline stage's device, by part, before anything is started.

Weights, gradients and the optimizer's state are closed forms (``config/memory.py``). What layers
keep for the backward is *counted*: one or two layers run on meta tensors, through the code that
trains (``counted_step.py``), at the configuration's batch, length, tensor and context parallelism,
and are multiplied by the layers of a stage and by the micro-batches that 1F1B has in flight there.

Bytes throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ttt.benchmarks.counted_step import count_step
from megatron_ttt.benchmarks.device_counter import Phase
from megatron_ttt.benchmarks.scan_plan import state_bytes
from megatron_ttt.config.derived import (
    data_parallel_size,
    micro_batches,
    padded_vocab_size,
    ttt_layers,
)
from megatron_ttt.config.devices import Device
from megatron_ttt.config.memory import static_memory
from megatron_ttt.config.schema import Config, Recompute, Trainable, TTTMode
from megatron_ttt.parallel.cost import GPU_CLUSTER, predict
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

GIB = 2**30
_FP32 = 4
_BF16 = 2
# Kept free: what CUDA, NCCL and the allocator's pieces take. A rule of thumb, not a measurement.
RESERVE = 0.08


@dataclass(frozen=True)
class LayerBytes:
    """What the graph keeps for the backward of one micro-batch.

    ``plain``, ``fast``: of a layer without and with fast weights; ``ends``: of everything else,
    nearly all of it the loss.
    """

    plain: int
    fast: int
    ends: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a device of one pipeline stage.

    Attributes:
        stage: from 0.
        weights, gradients, optimizer: see ``config/memory.py``.
        activations: kept for the backward by the layers, of all micro-batches in flight.
        loss: logits and what the loss makes of them; the last stage's.
        recomputed: what a layer keeps while its backward runs it once more.
        states: of one fast-weight layer while it runs: state, its gradient, and ``W0 + eta S``.
        messages: that the scan of one layer sends at once.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    recomputed: int
    states: int
    messages: int

    @property
    def total(self) -> int:
        return sum(value for _, value in self.parts())

    def parts(self) -> Iterator[tuple[str, int]]:
        """Yield the parts by name."""
        for field in fields(self):
            if field.name != "stage":
                yield field.name, getattr(self, field.name)


def counted_layers(config: Config, *, documents: int = 1) -> LayerBytes:
    """Count what layers keep for the backward, in bf16, on one pipeline stage."""

    def saved(layers: int, fast: bool) -> int:
        small = deepcopy(config)
        small.model.layers, small.parallel.pp = layers, 1
        small.ttt.mode = TTTMode.in_place if fast else TTTMode.off
        small.ttt.layers = [0] if fast else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about running, and nothing runs here
            return count_step(small, documents=documents).total(Phase.FORWARD).saved_bytes

    one = saved(1, fast=False)
    plain = saved(2, fast=False) - one
    ends = one - plain
    fast = saved(1, fast=True) - ends if ttt_layers(config) else 0
    return LayerBytes(plain, fast, ends)


def plan_memory(config: Config, *, ranks: int, documents: int = 1) -> list[StageMemory]:
    """Return the memory of every pipeline stage's devices, in bf16.

    Args:
        config: a valid configuration.
        ranks: of the job.
        documents: in each row.
    """
    layers = counted_layers(config, documents=documents)
    recomputed = 0
    if config.train.recompute is not Recompute.none:
        whole = deepcopy(config)
        whole.train.recompute = Recompute.none
        kept = counted_layers(whole, documents=documents)
        recomputed = max(kept.plain - layers.plain, kept.fast - layers.fast)
    return [_stage(config, stage, layers, recomputed, ranks) for stage in range(config.parallel.pp)]


def _stage(
    config: Config, stage: int, layers: LayerBytes, recomputed: int, ranks: int
) -> StageMemory:
    parallel = config.parallel
    shards = data_parallel_size(config, ranks) * parallel.cp
    static = static_memory(config, stage=stage, shards=shards, compute_bytes=_BF16)
    count = config.model.layers // parallel.pp
    own = range(stage * count, (stage + 1) * count)
    fast = len(set(own) & set(ttt_layers(config)))
    flying = min(parallel.pp - stage, micro_batches(config, ranks))
    return StageMemory(
        stage,
        static.weights,
        static.gradients,
        static.optimizer,
        flying * ((count - fast) * layers.plain + fast * layers.fast),
        layers.ends + _loss_work(config) if stage == parallel.pp - 1 else 0,
        recomputed,
        _states(config) if fast else 0,
        _messages(config) if fast else 0,
    )


def _loss_work(config: Config) -> int:
    """Logits in the compute dtype and their fp32 form, of the tokens that have some at once."""
    train, parallel = config.train, config.parallel
    tokens = train.micro_batch_size * train.seq_length // parallel.cp
    tokens = min(tokens, train.loss_tokens or tokens)
    columns = padded_vocab_size(config.model, parallel.tp) // parallel.tp
    return tokens * columns * (_BF16 + _FP32)


def _states(config: Config) -> int:
    """State and gradient sum in fp32, the effective weight, and dW0 in fp32, of all rows."""
    matrix = config.model.hidden_size * config.model.ffn_hidden_size // config.parallel.tp
    rows = config.train.micro_batch_size
    spans = 2 if config.parallel.cp_order is SequenceOrder.zigzag else 1
    summaries = spans * rows * _FP32 if config.parallel.cp > 1 else 0
    return matrix * (rows * (2 * _FP32 + _BF16) + _FP32 + summaries)


def _messages(config: Config) -> int:
    parallel = config.parallel
    if parallel.cp == 1:
        return 0
    named = parallel.scan
    algorithms = [a for a in ScanAlgorithm if a is not ScanAlgorithm.auto]
    return max(
        predict(
            algorithm,
            ranks=parallel.cp,
            order=parallel.cp_order,
            state_bytes=state_bytes(config),
            topology=GPU_CLUSTER,
        ).bytes_sent
        for algorithm in ([named] if named is not ScanAlgorithm.auto else algorithms)
    )


def fits(stages: list[StageMemory], device: Device) -> bool:
    """Whether the fullest stage leaves the reserve free."""
    return max(stage.total for stage in stages) <= room(device)


def room(device: Device) -> float:
    """Return the bytes of a device that a run may fill."""
    return device.value.memory_gb * 1e9 * (1 - RESERVE)


def report(config: Config, stages: list[StageMemory], device: Device, console: Console) -> None:
    """Print GiB by part, a column for every stage that differs from the one before."""
    shown = [
        stage
        for before, stage in zip([None, *stages], stages, strict=False)
        if before is None or list(stage.parts()) != list(before.parts())
    ]
    console.print(f"{config.model.name}: GiB on one device", highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    for stage in shown:
        table.add_column(f"stage {stage.stage}", justify="right")
    for name in dict(shown[0].parts()):
        table.add_row(name, *(f"{dict(stage.parts())[name] / GIB:.2f}" for stage in shown))
    table.add_row("all", *(f"{stage.total / GIB:.2f}" for stage in shown))
    console.print(table)
    most, has = max(stage.total for stage in stages) / GIB, room(device) / GIB
    console.print()
    if config.train.trainable is not Trainable.all:
        console.print("activations are counted as if all layers were trained: an upper bound")
    verdict = "fits" if fits(stages, device) else "does not fit"
    console.print(
        f"{verdict} {device.name}: {most:.1f} of {has:.1f} GiB"
        f" ({device.value.memory_gb:g} GB less {RESERVE:.0%})",
        highlight=False,
    )


def advice(config: Config, *, ranks: int, device: Device, documents: int) -> Iterator[str]:
    """Yield changes that need less memory, and all of them together, with what they need."""
    changes = list(_changes(config))
    for some in [[change] for change in changes] + ([changes] if len(changes) > 1 else []):
        changed = deepcopy(config)
        for key, value in some:
            group, name = key.split(".")
            setattr(getattr(changed, group), name, value)
        more = ranks * changed.parallel.tp // config.parallel.tp
        stages = plan_memory(changed, ranks=more, documents=documents)
        most = max(stage.total for stage in stages) / GIB
        words = " ".join(
            f"{key}={value.value if isinstance(value, Recompute) else value}" for key, value in some
        )
        on = f" on {more} ranks" if more != ranks else ""
        says = "fits" if fits(stages, device) else "not enough"
        yield f"{words}{on}: {most:.1f} GiB, {says}"


def _changes(config: Config) -> Iterator[tuple[str, Any]]:
    train, parallel, model = config.train, config.parallel, config.model
    if train.loss_tokens is None:
        yield "train.loss_tokens", 4096
    if train.recompute is not Recompute.full:
        yield "train.recompute", Recompute.full
    double = 2 * parallel.tp
    if all(size % double == 0 for size in (model.heads, model.kv_groups, model.ffn_hidden_size)):
        yield "parallel.tp", double
    if train.micro_batch_size > 1:
        yield "train.micro_batch_size", train.micro_batch_size // 2


def as_record(stages: list[StageMemory]) -> list[dict[str, Any]]:
    """Return every number, for a file."""
    return [asdict(stage) for stage in stages]
