"""Pretraining, from a configuration to the last checkpoint: read :func:`pretrain` first."""

import json
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
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
from torch import Tensor

from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.config.derived import eta_factor, micro_batches, ttt_layers
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.run_directory import CONFIG_FILE, plain
from megatron_ttt.config.schema import Config, OptimizerForm, TTTMode
from megatron_ttt.config.to_megatron import ddp_config, optimizer_config, transformer_config
from megatron_ttt.data.batches import DataStreams, build_data
from megatron_ttt.data.fingerprint import fingerprint
from megatron_ttt.data.sources import Source, open_source
from megatron_ttt.files import sync_file
from megatron_ttt.model.build import build_model
from megatron_ttt.model.initialize import Origin
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.model.sequence_layout import ScanSettings
from megatron_ttt.model.trainable import freeze
from megatron_ttt.training import resilience
from megatron_ttt.training.checkpoint import TrainingState
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, Retention, SaveFailed, SaveMode
from megatron_ttt.training.distributed import Ranks, distributed
from megatron_ttt.training.figures import PendingFigures, StepFigures, finite_grad_norm
from megatron_ttt.training.metrics import Reporter, Row, plot_loss, read_metrics
from megatron_ttt.training.resilience import STOPPED, Displaced, StopRequest, on_first_rank
from megatron_ttt.training.resume import start, weights_follow
from megatron_ttt.training.run_folder import sole_writer
from megatron_ttt.training.schedule import lr_schedule, target_rate
from megatron_ttt.training.step import (
    ForwardStep,
    LossSum,
    Observations,
    run_micro_batches,
)
from megatron_ttt.training.whole_stage import whole_stage

# a path or a message is shown as it is: not coloured, not broken into lines
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


@dataclass
class Trainer:
    """What a run trains with, on one rank."""

    config: Config
    ranks: Ranks
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    scan: ScanSettings

    @property
    def stage(self) -> Any:
        """The pipeline stage inside DDP with all its weights; every rank asks at the same point."""
        return whole_stage(self.model)

    @property
    def state(self) -> TrainingState:
        """What checkpoints hold."""
        return TrainingState(self.model, self.optimizer, self.scheduler)

    @property
    def lr(self) -> float:
        """The learning rate of the next step; the target generator may have a multiple of it."""
        return float(self.scheduler.get_lr({}))

    def _step(self, mode: TTTMode, **options: Any) -> ForwardStep:
        return ForwardStep(self.config, self.ranks, scan=self.scan, mode=mode, **options)

    def train_step(
        self, data: Any, *, wants_norms: bool = True, eta_factor: float = 1.0
    ) -> tuple[Tensor, float, Observations]:
        """One optimizer step over a global batch: (this rank's loss sums, gradient norm, ...).

        Raises:
            FloatingPointError: the gradient norm is not finite; no weight has changed.
        """
        step = self._step(self.config.ttt.mode, wants_norms=wants_norms, eta_factor=eta_factor)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss_sums = run_micro_batches(
            step,
            self.model,
            data,
            micro_batches=micro_batches(self.config, self.ranks.world_size),
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(self.config.train.global_batch_size)
        return loss_sums, float(grad_norm), step.observations

    def validation_loss(self, data: Any, mode: TTTMode, eta_factor: float = 1.0) -> float:
        """Loss over ``validation.batches`` global batches with fast weights on or off."""
        self.model.eval()
        step = self._step(mode, eta_factor=eta_factor)
        with torch.no_grad():
            loss_sums = run_micro_batches(
                step,
                self.model,
                data,
                micro_batches=micro_batches(self.config, self.ranks.world_size)
                * self.config.validation.batches,
                forward_only=True,
            )
        self.model.train()
        return LossSum.over(self.ranks, loss_sums).mean


def pretrain(config: Config, given: Collection[str] = ()) -> int:
    """Train as the configuration says; returns the process's exit status.

    ``given`` are the dotted keys that the user gave: what is a choice where a checkpoint differs.

    0: all steps done. 1: a checkpoint could not be saved, a loss is not finite, or another run has
    taken over the folder of this one, which had shown no sign of life.
    :data:`~.resilience.STOPPED`: asked to stop, saved, to be started again.

    Raises:
        ConfigError: for mistakes that only show when the run starts (data, checkpoints).
    """
    with ExitStack() as stack:
        stop = stack.enter_context(resilience.listening())
        stack.enter_context(resilience.deterministic(config.run.deterministic))
        ranks = stack.enter_context(distributed(config))
        console = Console(quiet=not ranks.is_first)
        report = partial(console.print, **PLAIN)
        ours = stack.enter_context(sole_writer(config, ranks, report))
        begin = Origin.LOADED if weights_follow(config, ranks) else Origin.DRAWN
        trainer = build_trainer(config, ranks, begin)
        source, identity = open_corpus(config, ranks)
        progress = start(config, trainer.state, ranks, report, data=identity, given=given)
        data = open_data(config, source, ranks, progress)
        reporter = None
        if ranks.is_first:  # nothing is written before everything that can be refused has passed
            reporter = open_reporter(config, progress, console)
            stack.callback(reporter.close)
        saver = build_saver(trainer, console, data=identity)
        try:
            done = train(trainer, data, progress, reporter, saver, stop, ours=ours)
            saver.finish()
        except (SaveFailed, FloatingPointError, Displaced) as error:
            Console(stderr=True, quiet=not ranks.is_first).print(str(error), **PLAIN)
            return 1
        if not done:
            console.print("stopped as asked; the same command goes on from here", **PLAIN)
            return STOPPED
    if ranks.is_first:
        finish(config, console)
    return 0


def open_reporter(config: Config, progress: Progress, console: Console) -> Reporter:
    """Open the run's folder and all that rows go to, cut back to where the run stands.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(plain(config)), folder / CONFIG_FILE)
        reporter = Reporter(config, plain(config), console, done=progress.step)
        reporter.file.cut_to(progress.metrics_bytes)
    except OSError as error:
        message = f"cannot be written to ({resilience.reason(error)})"
        raise ConfigError([Fault("run.dir", config.run.dir, message)]) from error
    return reporter


def build_saver(trainer: Trainer, console: Console, *, data: dict[str, Any]) -> CheckpointSaver:
    """Return what saves this run's checkpoints; ``data`` identifies its texts."""
    config, settings = trainer.config, trainer.config.checkpoint
    return CheckpointSaver(
        Path(config.run.dir) / "checkpoints",
        trainer.state,
        ranks=trainer.ranks,
        mode=SaveMode.ASYNCHRONOUS if settings.async_save else SaveMode.SYNCHRONOUS,
        facts={
            "config": plain(config),
            "data": data,
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
        },
        retention=Retention(settings.keep_last, settings.keep_every),
        report=partial(console.print, **PLAIN),
    )


def open_corpus(config: Config, ranks: Ranks) -> tuple[Source, dict[str, Any]]:
    """Return the checked data, and what tells it from other data.

    Raises:
        ConfigError: whatever is wrong with the data, in one line.
    """
    try:
        source = open_source(
            config.data,
            vocab_size=config.model.vocab_size,
            is_builder=ranks.is_first,
            barrier=dist.barrier,
        )
        return source, on_first_rank(ranks, lambda: fingerprint(source))
    except (ValueError, OSError) as error:
        fault = Fault("data.path", config.data.path, str(error))
        raise ConfigError([fault]) from error


def open_data(config: Config, source: Source, ranks: Ranks, progress: Progress) -> DataStreams:
    """Return the samples, read from where the run stands.

    Raises:
        ConfigError: whatever is wrong with the data, in one line.
    """
    train = config.train
    try:
        return build_data(
            config,
            source,
            dp_rank=ranks.data_rank,
            dp_size=ranks.data_size,
            consumed_samples=progress.consumed_samples,
            train_samples=progress.samples_at(train.steps, train.global_batch_size),
            is_builder=ranks.is_first,
        )
    except ValueError as error:
        raise ConfigError([Fault("data.path", config.data.path, str(error))]) from error


def build_trainer(config: Config, ranks: Ranks, begin: Origin = Origin.DRAWN) -> Trainer:
    """Model, DDP, optimizer and schedule of this rank; ``begin``: where weights come from."""
    on_gpu = ranks.device.type == "cuda"
    transformer = transformer_config(
        config,
        device_is_cuda=on_gpu,
        deterministic=config.run.deterministic,
    )
    model = build_model(config, transformer, ranks.groups, begin).to(ranks.device)
    freeze(model, config.train.trainable, ttt_layers(config))
    transformer.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        transformer,
        ddp_config(config.parallel, device_is_cuda=on_gpu),
        model,
        pg_collection=ranks.groups,
    )
    settings = optimizer_config(config)
    optimizer = get_megatron_optimizer(
        settings, [wrapped], target_rate(config, settings), use_gloo_process_groups=False
    )
    transformer.grad_scale_func = optimizer.scale_loss
    optimizer.get_grad_norm = finite_grad_norm(optimizer)
    return Trainer(
        config,
        ranks,
        wrapped,
        optimizer,
        lr_schedule(config, optimizer),
        scan_settings(config.parallel, ranks.scan_group),
    )


def train(
    trainer: Trainer,
    data: DataStreams,
    progress: Progress,
    reporter: Reporter | None,
    saver: CheckpointSaver,
    stop: StopRequest,
    *,
    ours: Callable[[], bool],
) -> bool:
    """Train, validate and save until ``train.steps`` are done, or a stop is asked for.

    Args:
        ours: whether the run's folder still is.

    Returns:
        Whether all steps are done. Either way the last one is saved, or being saved.
    """
    config, pending = trainer.config, PendingFigures()
    for step in range(progress.step + 1, config.train.steps + 1):
        began, lr = time.monotonic(), trainer.lr
        last = step == config.train.steps
        validates = due(step, config.validation.interval)
        saves = due(step, config.checkpoint.interval) or last
        # a run shows its first step at once
        reports = validates or saves or due(step, config.logging.interval) or not pending.reported
        try:
            loss_sums, grad_norm, observations = trainer.train_step(
                data.train_iterator, wants_norms=reports, eta_factor=eta_factor(config, step)
            )
        except FloatingPointError as error:
            _write(reporter, pending.rows(trainer.model, config, trainer.ranks))
            raise FloatingPointError(f"step {step}: {error}") from error
        asked = stop.ranks_agree(trainer.ranks, displaced=not ours())  # before anything is written
        progress = progress.after_step(
            config.train.global_batch_size, seq_length=config.train.seq_length
        )
        pending.add(
            StepFigures(
                step=step,
                loss_sums=loss_sums,
                grad_norm=grad_norm,
                lr=lr,
                seconds=time.monotonic() - began,
                consumed_tokens=progress.consumed_tokens,
                pairs=observations.pairs,
                peak_memory_bytes=_peak_memory(trainer.ranks),
            ),
            observations,
        )
        stopping = asked and not last
        saves = saves or stopping
        if reports or stopping:
            rows = pending.rows(trainer.model, config, trainer.ranks)
            rows[-1] |= _validate(trainer, data, eta_factor(config, step)) if validates else {}
            _write(reporter, rows)
        if config.logging.sample_ids:
            _log_samples(trainer, step, observations)
        saver.poll()
        if saves:
            written = sync_file(reporter.file.path) if reporter is not None else 0
            whole = last or not config.parallel.distributed_optimizer
            form = OptimizerForm.fully_reshardable if whole else config.checkpoint.periodic
            saver.save(replace(progress, metrics_bytes=written), form)
        if stopping:
            return False
    return True


def _write(reporter: Reporter | None, rows: list[Row]) -> None:
    if reporter is not None:
        for row in rows:
            reporter.write(row)


def due(step: int, interval: int | None) -> bool:
    """Whether something that is done every ``interval`` steps is done at this one."""
    return interval is not None and step % interval == 0


def finish(config: Config, console: Console) -> None:
    """Draw the plot and say where everything is."""
    folder = Path(config.run.dir)
    if config.logging.plot:
        rows = read_metrics(folder / "metrics.jsonl")
        plot_loss(rows, folder / "loss.png", title=f"{config.run.name}: loss over training")
    contents = ["config.yaml", "metrics.jsonl", "checkpoints/"]
    contents += ["loss.png"] if config.logging.plot else []
    console.print(f"done: {', '.join(contents)} are in {folder.resolve()}", soft_wrap=True)


def _log_samples(trainer: Trainer, step: int, observations: Observations) -> None:
    """Append the step's sample numbers to ``samples.jsonl``, as often as the step is done."""
    ranks = trainer.ranks
    parts: list[list[int]] = [[] for _ in range(ranks.data_size)]
    dist.all_gather_object(parts, observations.sample_ids, group=ranks.groups.dp)
    if ranks.is_first:
        row = {"step": step, "samples": sorted(number for part in parts for number in part)}
        with (Path(trainer.config.run.dir) / "samples.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _validate(trainer: Trainer, data: DataStreams, eta_factor: float) -> Row:
    """Measure the validation loss with fast weights on and, from the same weights, off."""
    assert data.validation_iterator is not None
    modes = {"validation/loss": trainer.config.ttt.mode}
    if ttt_layers(trainer.config):
        modes["validation/loss_ttt_off"] = TTTMode.off
    return {
        name: trainer.validation_loss(data.validation_iterator(), mode, eta_factor)
        for name, mode in modes.items()
    }


def _peak_memory(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
