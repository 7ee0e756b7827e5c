"""The learning rate over a run, counted in samples: it does not depend on the batch size."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ttt.checkpoints.progress import BEGINNING, Progress
from megatron_ttt.config.derived import decay_steps, ttt_layers, warmup_steps
from megatron_ttt.config.schema import Config
from megatron_ttt.rule import added_start


def lr_schedule(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay of a run that begins."""
    settings = config.optimizer
    warmup, end = _bounds(config, BEGINNING)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=end,
        lr_decay_style=settings.schedule.value,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=end,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def target_rate(config: Config, settings: OptimizerConfig) -> dict[ParamKey, Any] | None:
    """Return Megatron's overrides by which the target generator follows a multiple of the schedule.

    ``None`` where it follows the schedule itself: Megatron's own groups of parameters.
    """
    factor = config.optimizer.target_lr_factor
    if factor == 1 or not ttt_layers(config):
        return None
    is_added = ParamWithNamePredicate(
        name="target generator", fn=lambda _, name: added_start(name) is not None
    )
    # Nothing multiplies by lr_mult: by it Megatron tells groups of parameters apart when it loads.
    rates = {
        "max_lr": factor * settings.lr,
        "min_lr": factor * settings.min_lr,
        "lr_mult": factor,
    }
    return {
        **get_standard_config_overrides(settings),
        ParamKey(with_name_predicate=is_added): rates,
    }


def fit_schedule(scheduler: OptimizerParamScheduler, config: Config, progress: Progress) -> None:
    """Let warm-up and decay end where their steps end for a run that goes on from ``progress``."""
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps = _bounds(config, progress)
    scheduler.wd_incr_steps = scheduler.lr_decay_steps
    scheduler.num_steps = progress.consumed_samples
    scheduler.step(0)


def _bounds(config: Config, progress: Progress) -> tuple[int, int]:
    """Return samples after which warm-up and decay end."""
    batch = config.train.global_batch_size
    warmup = progress.samples_at(warmup_steps(config), batch)
    return warmup, progress.samples_at(decay_steps(config), batch)
