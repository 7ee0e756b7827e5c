"""Pretraining, from a configuration to the last checkpoint: read :func:`pretrain` first."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from omegaconf import OmegaConf
from rich.console import Console

from megatron_ttt.config.derived import micro_batches, ttt_layers, warmup_steps
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.run_directory import CONFIG_FILE
from megatron_ttt.config.schema import Config, TTTMode
from megatron_ttt.config.to_megatron import ddp_config, optimizer_config, transformer_config
from megatron_ttt.data.batches import DataStreams, build_data
from megatron_ttt.model.build import build_model
from megatron_ttt.training import checkpoint
from megatron_ttt.training.checkpoint_files import Progress, remove_surplus
from megatron_ttt.training.distributed import Ranks, distributed
from megatron_ttt.training.flops import training_flops
from megatron_ttt.training.metrics import Reporter, Row, plot_loss, read_metrics
from megatron_ttt.training.step import (
    ForwardStep,
    LossSum,
    Observations,
    check_finite,
    run_micro_batches,
    update_ratios,
)


@dataclass
class Trainer:
    """What a run trains with, on one rank."""

    config: Config
    ranks: Ranks
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def stage(self) -> Any:
        """The pipeline stage inside DDP."""
        return self.model.module

    def train_step(self, data: Any) -> tuple[LossSum, float, Observations]:
        """One optimizer step over a global batch: (loss, gradient norm, observations)."""
        step = ForwardStep(self.config, self.ranks, mode=self.config.ttt.mode)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = run_micro_batches(
            step,
            self.model,
            data,
            micro_batches=micro_batches(self.config, self.ranks.world_size),
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(self.config.train.global_batch_size)
        return loss, float(grad_norm), step.observations

    def validation_loss(self, data: Any, mode: TTTMode) -> float:
        """Loss over ``validation.batches`` global batches with fast weights on or off."""
        self.model.eval()
        step = ForwardStep(self.config, self.ranks, mode=mode)
        with torch.no_grad():
            loss = run_micro_batches(
                step,
                self.model,
                data,
                micro_batches=micro_batches(self.config, self.ranks.world_size)
                * self.config.validation.batches,
                forward_only=True,
            )
        self.model.train()
        return loss.mean


def pretrain(config: Config) -> int:
    """Train as the configuration says; returns the process's exit status.

    Raises:
        ConfigError: for mistakes that only show when the run starts (data, checkpoints).
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(distributed(config))
        console = Console(quiet=not ranks.is_first)
        trainer = build_trainer(config, ranks)
        progress = start(trainer, console)
        data = open_data(config, ranks, progress)
        reporter = None
        if ranks.is_first:  # nothing is written before everything that can be refused has passed
            folder = Path(config.run.dir)
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(_as_dict(config)), folder / CONFIG_FILE)
            reporter = Reporter(config, _as_dict(config), console, done=progress.step)
            stack.callback(reporter.close)
            reporter.file.cut_to(progress.metrics_bytes)
        train(trainer, data, progress, reporter, console)
    if ranks.is_first:
        finish(config, console)
    return 0


def open_data(config: Config, ranks: Ranks, progress: Progress) -> DataStreams:
    """The corpus, read from where the run stands.

    Raises:
        ConfigError: whatever is wrong with the data, in one line.
    """
    try:
        return build_data(
            config,
            dp_rank=ranks.data_rank,
            dp_size=ranks.data_size,
            consumed_samples=progress.consumed_samples,
            train_samples=config.train.steps * config.train.global_batch_size,
            is_builder=ranks.is_first,
            barrier=dist.barrier,
        )
    except ValueError as error:
        raise ConfigError([Fault("data.path", config.data.path, str(error))]) from error


def build_trainer(config: Config, ranks: Ranks) -> Trainer:
    """Model, DDP, optimizer and schedule of this rank."""
    transformer = transformer_config(config, device_is_cuda=ranks.device.type == "cuda")
    model = build_model(config, transformer, ranks.groups).to(ranks.device)
    transformer.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        transformer, ddp_config(config), model, pg_collection=ranks.groups
    )
    optimizer = get_megatron_optimizer(optimizer_config(config), [wrapped])
    transformer.grad_scale_func = optimizer.scale_loss
    return Trainer(config, ranks, wrapped, optimizer, lr_schedule(config, optimizer))


def lr_schedule(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in samples so that a batch size is no unit of time."""
    settings, batch = config.optimizer, config.train.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps(config) * batch,
        lr_decay_steps=config.train.steps * batch,
        lr_decay_style=settings.schedule.value,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.train.steps * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def start(trainer: Trainer, console: Console) -> Progress:
    """Resume, start from given weights, or start from nothing."""
    config, ranks = trainer.config, trainer.ranks
    root = Path(config.run.dir) / "checkpoints"
    folder: Path | None = None
    if config.run.resume == "auto":
        folder = checkpoint.newest(root, ranks, console.print)
    elif config.run.resume != "never":
        folder = Path(config.run.resume)
    elif list(root.glob("step_*")):
        raise ConfigError(
            [
                Fault(
                    "run.resume",
                    "never",
                    f"{root} holds checkpoints; use run.resume=auto or another run.dir",
                )
            ]
        )
    if folder is not None:
        try:
            progress, facts = checkpoint.verified(folder, ranks)
        except checkpoint.DamagedCheckpoint as error:
            raise ConfigError([Fault("run.resume", config.run.resume, str(error))]) from error
        checkpoint.load(
            folder,
            model=trainer.stage,
            optimizer=trainer.optimizer,
            scheduler=trainer.scheduler,
            ranks=ranks,
            seed=config.train.seed,
            progress=progress,
            saved_layout=facts["layout"],
        )
        console.print(f"resumed from {folder} at step {progress.step}")
        return progress
    if config.checkpoint.load is not None:
        checkpoint.load_weights(
            Path(config.checkpoint.load),
            model=trainer.stage,
            optimizer=trainer.optimizer,
            ranks=ranks,
        )
        console.print(f"weights from {config.checkpoint.load}")
    return Progress(step=0, consumed_samples=0, consumed_tokens=0, metrics_bytes=0)


def train(
    trainer: Trainer,
    data: DataStreams,
    progress: Progress,
    reporter: Reporter | None,
    console: Console,
) -> None:
    """Steps, validations and checkpoints until ``train.steps`` are done."""
    config = trainer.config
    batch = config.train.global_batch_size
    for step in range(progress.step + 1, config.train.steps + 1):
        began = time.monotonic()
        loss, grad_norm, observations = trainer.train_step(data.train_iterator)
        check_finite(loss.mean, grad_norm, step)
        row: Row = {
            "step": step,
            "loss": loss.mean,
            "grad_norm": grad_norm,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "consumed_tokens": step * batch * config.train.seq_length,
            **_health(trainer, observations),
            **_speed(trainer, observations, time.monotonic() - began),
        }
        if config.validation.interval and step % config.validation.interval == 0:
            row |= _validate(trainer, data)
        if reporter is not None:
            reporter.write(row)
        interval = config.checkpoint.interval
        if step == config.train.steps or (interval is not None and step % interval == 0):
            done = Progress(
                step=step,
                consumed_samples=step * batch,
                consumed_tokens=step * batch * config.train.seq_length,
                metrics_bytes=reporter.file.size() if reporter is not None else 0,
            )
            _save(trainer, done, console)


def finish(config: Config, console: Console) -> None:
    """Draw the plot and say where everything is."""
    folder = Path(config.run.dir)
    if config.logging.plot:
        rows = read_metrics(folder / "metrics.jsonl")
        plot_loss(rows, folder / "loss.png", title=f"{config.run.name}: loss over training")
    contents = ["config.yaml", "metrics.jsonl", "checkpoints/"]
    contents += ["loss.png"] if config.logging.plot else []
    console.print(f"done: {', '.join(contents)} are in {folder.resolve()}", soft_wrap=True)


def _save(trainer: Trainer, progress: Progress, console: Console) -> None:
    config, ranks = trainer.config, trainer.ranks
    root = Path(config.run.dir) / "checkpoints"
    folder = checkpoint.save(
        root,
        progress,
        model=trainer.stage,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        ranks=ranks,
        facts={
            "config": _as_dict(config),
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
        },
    )
    console.print(f"saved {folder}", highlight=False, soft_wrap=True)
    if ranks.is_first:
        settings = config.checkpoint
        remove_surplus(root, keep_last=settings.keep_last, keep_every=settings.keep_every)


def _validate(trainer: Trainer, data: DataStreams) -> Row:
    """Validation loss with fast weights on and, from the same weights, off."""
    assert data.validation_iterator is not None
    modes = {"validation/loss": trainer.config.ttt.mode}
    if ttt_layers(trainer.config):
        modes["validation/loss_ttt_off"] = TTTMode.off
    return {
        name: trainer.validation_loss(data.validation_iterator(), mode)
        for name, mode in modes.items()
    }


def _health(trainer: Trainer, observations: Observations) -> Row:
    ratios = update_ratios(observations, trainer.stage, trainer.config, trainer.ranks)
    return {f"ttt/update_ratio/layer_{layer:02d}": ratio for layer, ratio in ratios.items()}


def _speed(trainer: Trainer, observations: Observations, seconds: float) -> Row:
    """Throughput of the whole job, counted where the rows are; memory of this rank."""
    ranks, config = trainer.ranks, trainer.config
    counts = torch.tensor(
        [observations.tokens, observations.pairs], dtype=torch.float64, device=ranks.device
    )
    dist.all_reduce(counts, group=ranks.groups.dp)
    tokens, pairs = (int(count) for count in counts.tolist())
    flops = training_flops(config, tokens=tokens, pairs=pairs)
    speed: Row = {
        "tokens_per_second": tokens / seconds,
        "tflops_per_device": flops / seconds / ranks.world_size / 1e12,
        "step_time_s": seconds,
        "peak_memory_bytes": _peak_memory(ranks),
    }
    peak = config.logging.peak_tflops_per_device
    if peak is not None:
        speed["mfu"] = speed["tflops_per_device"] / peak
    return speed


def _peak_memory(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _as_dict(config: Config) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
