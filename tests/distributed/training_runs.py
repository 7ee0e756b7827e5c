"""Small training runs on real ranks, with live fast weights: what the layout tests compare.

Every run starts from the same model (drawn by name) and reads the same global batches, whatever
its layout, and reports whole tensors, so that any two runs can be compared.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.config.derived import eta_factor, ttt_layers
from megatron_ttt.config.schema import (
    Config,
    DataConfig,
    Family,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
    Toggle,
    TokenizerConfig,
    TokenizerKind,
    Trainable,
    TrainConfig,
    TTTConfig,
)
from megatron_ttt.data.batches import Batch
from megatron_ttt.model.initialize import Draw, global_parameters, initialize
from megatron_ttt.model.shards import sharded_dim
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import Normalize, TargetSource, WriteSettings
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.figures import update_ratios
from megatron_ttt.training.loop import Trainer, build_trainer
from megatron_ttt.training.step import LossSum, Observations

VOCABULARY = 67  # no multiple of any tp: the padded rows must not matter


def tiny_config(
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    sequence_parallel: Toggle = Toggle.auto,
    recompute: Recompute = Recompute.none,
    loss_tokens: int | None = None,
    trainable: Trainable = Trainable.all,
    recompute_modules: tuple[str, ...] = ("core_attn",),
    target: TargetSource = TargetSource.hidden_states,
    normalize: Normalize = Normalize.none,
    eta: float = 0.003,
    packed: bool = True,
    window: int | None = 24,
    tied: bool = True,
    write: WriteSettings | None = None,
    target_lr_factor: float = 1.0,
    **parallel: Any,
) -> Config:
    """Four layers, two of them fast, every size odd somewhere; 128 tokens in chunks of 8."""
    return Config(
        run=RunConfig(name="tiny", dir="unused", resume="never"),
        model=ModelConfig(
            name="tiny",
            family=Family.qwen3,
            layers=4,
            hidden_size=32,
            ffn_hidden_size=56,
            heads=4,
            kv_groups=2,
            head_dim=12,
            vocab_size=VOCABULARY,
            max_positions=128,
            qk_norm=True,
            tied_embeddings=tied,
            sliding_window=window,
        ),
        ttt=TTTConfig(
            layers=[0, 3],
            chunk_size=8,
            eta=eta,
            target=target,
            normalize=normalize,
            write=write or WriteSettings(),
        ),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
            reset_attention=packed,
            reset_positions=packed,
            reset_fast_weights=packed,
        ),
        parallel=ParallelConfig(
            tp=tp, cp=cp, pp=pp, sequence_parallel=sequence_parallel, **parallel
        ),
        optimizer=OptimizerConfig(
            lr=1e-3,
            target_lr_factor=target_lr_factor,
            warmup_steps=0,
            weight_decay=0.1,
            clip_grad=1.0,
        ),
        train=TrainConfig(
            steps=20,
            seed=5,
            seq_length=128,
            micro_batch_size=2,
            global_batch_size=4,
            recompute=recompute,
            loss_tokens=loss_tokens,
            trainable=trainable,
            recompute_modules=list(recompute_modules),
        ),
    )


def live_draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Asymmetric convolution, dense projection: nothing is zero, symmetric or diagonal."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * values
    if "ttt_conv" in name or "ttt_gate" in name:
        return 0.5 * values
    if "ttt_proj" in name:
        return values / shape[0] ** 0.5
    if "embedding" in name:
        return 0.5 * values
    return 0.15 * values


def global_batch(config: Config, step: int, *, packed: bool) -> Batch:
    """The whole global batch of a step: random text with documents on and off chunk edges."""
    rows, length = config.train.global_batch_size, config.train.seq_length
    generator = torch.Generator().manual_seed(1000 + step)
    # A first-order pattern makes the loss fall, so that twenty steps mean something.
    tokens = torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator)
    follow = torch.rand(rows, length, generator=generator) < 0.7
    for place in range(length):
        after = (tokens[:, place] * 7 + 3) % VOCABULARY
        tokens[:, place + 1] = torch.where(follow[:, place], after, tokens[:, place + 1])
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, 0] = True
    padding = torch.zeros(rows, length, dtype=torch.bool)
    counted = torch.rand(rows, length, generator=generator) < 0.9
    if packed:
        starts |= torch.rand(rows, length, generator=generator) < 0.02
        edges = torch.arange(length) % 16 == 0
        starts |= edges & (torch.rand(rows, length, generator=generator) < 0.2)
        for row in range(0, rows, 3):  # some rows end in padding
            padding[row, length - 5 * (row + 1) :] = True
        counted &= ~padding
    return Batch(
        tokens_BT=tokens[:, :-1],
        labels_BT=tokens[:, 1:],
        loss_mask_BT=counted,
        document_starts_BT=starts,
        padding_BT=padding,
        sample_ids_B=torch.arange(rows) + step * rows,
    )


def micro_batches_of(batch: Batch, config: Config, ranks: Ranks) -> Iterator[Batch]:
    """This data-parallel rank's rows, one micro-batch at a time."""
    rows = config.train.global_batch_size // ranks.data_size
    size = config.train.micro_batch_size
    for first in range(ranks.data_rank * rows, (ranks.data_rank + 1) * rows, size):
        yield Batch(**{name: value[first : first + size] for name, value in vars(batch).items()})


@dataclass
class RunReport:
    """What one rank has to say; parts of tensors carry their place."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    ratios: list[dict[int, float]] = field(default_factory=list)
    scans: list[int] = field(default_factory=list)
    gradients: dict[str, tuple[int, int | None, Tensor]] = field(default_factory=dict)


Fault = Callable[[Trainer], AbstractContextManager[None]]


def no_fault(trainer: Trainer) -> AbstractContextManager[None]:
    """Train as it should be."""
    return nullcontext()


def run_training(
    rank: int,
    ranks: int,
    config: Config,
    steps: int,
    draw: Draw | None = None,
    fault: Fault = no_fault,
) -> RunReport:
    """Train ``steps`` steps on this rank and report; called through the pool."""
    report = RunReport()
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, draw or live_draw)
        with fault(trainer):
            for step in range(steps):
                batch = global_batch(config, step, packed=config.data.reset_fast_weights)
                first = step == 0
                train_one(trainer, batch, report, keep_gradients=first)
    return report


def redraw(trainer: Trainer, draw: Draw) -> None:
    """Give every parameter a live value, the same in every layout."""
    config, groups = trainer.config, trainer.ranks.groups
    initialize(
        trainer.stage,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        draw=draw,
    )
    trainer.optimizer.reload_model_params()


def train_one(trainer: Trainer, batch: Batch, report: RunReport, *, keep_gradients: bool) -> None:
    """One step; gradients are those before clipping."""
    original = trainer.optimizer.step
    if keep_gradients:

        def step_and_keep() -> Any:
            report.gradients = gradients(trainer)
            return original()

        trainer.optimizer.step = step_and_keep
    data = micro_batches_of(batch, trainer.config, trainer.ranks)
    factor = eta_factor(trainer.config, len(report.losses) + 1)
    loss_sums, grad_norm, observations = trainer.train_step(data, eta_factor=factor)
    trainer.optimizer.step = original
    ratios = job_update_ratios(trainer, observations)
    report.losses.append(LossSum.over(trainer.ranks, loss_sums).mean)
    report.grad_norms.append(grad_norm)
    report.scans.append(sum(len(records) for records in observations.scans))
    report.ratios.append(ratios)


def job_update_ratios(trainer: Trainer, observations: Observations) -> dict[int, float]:
    """The update ratio of every fast layer of the model, the largest over all ranks."""
    ratios = update_ratios(observations, trainer.model, trainer.config, trainer.ranks)
    dist.all_reduce(ratios, op=dist.ReduceOp.MAX)
    return dict(zip(ttt_layers(trainer.config), ratios.tolist(), strict=True))


def gradients(trainer: Trainer) -> dict[str, tuple[int, int | None, Tensor]]:
    """This rank's gradients by global name: (tensor rank, sharded dim, values)."""
    groups = trainer.ranks.groups
    for buffer in trainer.model.buffers:  # undo the distributed optimizer's reduce-scatter
        for bucket in buffer.buckets:
            if trainer.config.parallel.distributed_optimizer and groups.dp_cp.size() > 1:
                mine = bucket.grad_data.chunk(groups.dp_cp.size())[groups.dp_cp.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=groups.dp_cp)
    found = {}
    trained = (item for item in global_parameters(trainer.stage) if item[1].requires_grad)
    for name, parameter in trained:
        gradient: Tensor = getattr(parameter, "main_grad").detach().clone()  # noqa: B009
        found[name] = (groups.tp.rank(), sharded_dim(parameter), gradient)
    return found


def whole_gradients(reports: list[RunReport]) -> dict[str, Tensor]:
    """Join the shards of all ranks: the gradient of every parameter of the model."""
    shards: dict[str, dict[int, tuple[int | None, Tensor]]] = {}
    for report in reports:
        for name, (tp_rank, axis, values) in report.gradients.items():
            shards.setdefault(name, {}).setdefault(tp_rank, (axis, values))
    whole = {}
    for name, parts in shards.items():
        axis = parts[0][0]
        tensors = [parts[rank][1] for rank in sorted(parts)]
        if axis is None:
            whole[name] = tensors[0]
        elif name.endswith("linear_fc1.weight"):  # gate rows, then up rows, on each rank
            halves = [tensor.chunk(2) for tensor in tensors]
            whole[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            whole[name] = torch.cat(tensors, dim=axis)
        if "embedding" in name or "output_layer" in name:
            whole[name] = whole[name][:VOCABULARY]
    return whole
