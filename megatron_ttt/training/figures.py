"""The figures of training steps: kept where they arise, put together at every reported step.

A step costs no communication for its figures. At a reported step one gather over the job brings
together those of all steps since the last report; tensor-parallel ranks first add up the squares of
their shards of the states.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ttt.config.derived import eta_factor, ttt_layers
from megatron_ttt.config.flops import training_flops
from megatron_ttt.config.schema import Config
from megatron_ttt.fast_weights.scale import squares, update_ratio
from megatron_ttt.training.distributed import Ranks
from megatron_ttt.training.metrics import Row
from megatron_ttt.training.step import Observations
from megatron_ttt.training.whole_stage import wait_for


@dataclass(frozen=True)
class StepFigures:
    """One step as one rank knows it.

    Attributes:
        step: counted from 1.
        loss_sums: see :func:`~.step.run_micro_batches`; on the rank's device.
        grad_norm: before clipping, equal on all ranks.
        lr: that the step used.
        seconds: that it took.
        consumed_tokens: of the whole run, this step's included.
        pairs: (query, key) pairs that attention visited in one layer, on this rank's rows.
        peak_memory_bytes: of this process, until now.
    """

    step: int
    loss_sums: Tensor
    grad_norm: float
    lr: float
    seconds: float
    consumed_tokens: int
    pairs: int
    peak_memory_bytes: int


def gather_rows(
    steps: Sequence[StepFigures],
    observations: Observations,
    model: DistributedDataParallel,
    config: Config,
    ranks: Ranks,
) -> list[Row]:
    """Rows of ``metrics.jsonl``, one a step, equal on all ranks. Every rank calls it together.

    Args:
        steps: those since the last report, in order.
        observations: of the last of them: update ratios and scans are its alone.
        model: with the weights after it.

    Returns:
        The rows; the last one has ``ttt/...`` as well.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    count, groups = len(steps), ranks.groups
    is_first_of_model = groups.tp.rank() == 0  # tensor ranks hold equal figures
    is_first_of_rows = is_first_of_model and groups.cp.rank() == groups.pp.rank() == 0
    sums = torch.stack([figures.loss_sums for figures in steps]) * is_first_of_model
    of_host = [figures.pairs * is_first_of_rows for figures in steps]
    of_host.append(observations.scan_exposed_s)
    ratios = update_ratios(observations, model, config, ranks)
    own = torch.cat([sums.flatten(), torch.tensor(of_host).to(sums), ratios])
    every = [torch.empty_like(own) for _ in range(ranks.world_size)]
    dist.all_gather(every, own)
    gathered = torch.stack(every).cpu()
    losses, pairs = gathered.sum(dim=0)[: 3 * count].split([2 * count, count])
    exposed, *known = gathered.max(dim=0).values[3 * count :].tolist()
    rows = [
        _row(figures, total, counted, visited, config, ranks)
        for figures, (total, counted), visited in zip(
            steps, losses.view(count, 2).tolist(), pairs.tolist(), strict=True
        )
    ]
    layers = ttt_layers(config)
    for layer, ratio in zip(layers, known, strict=True) if observations.has_norms else ():
        rows[-1][f"ttt/update_ratio/layer_{layer:02d}"] = ratio
    if layers and config.parallel.cp > 1:
        rows[-1]["ttt/scan_exposed_s"] = exposed
    return rows


class PendingFigures:
    """Steps whose rows wait for the next report."""

    def __init__(self) -> None:
        self.reported = False
        self._steps: list[StepFigures] = []
        self._observations = Observations()

    def add(self, figures: StepFigures, observations: Observations) -> None:
        """Keep one more step."""
        self._steps.append(figures)
        self._observations = observations

    def rows(self, model: DistributedDataParallel, config: Config, ranks: Ranks) -> list[Row]:
        """Those of the waiting steps; see :func:`gather_rows`."""
        self.reported = True
        steps, self._steps = self._steps, []
        return gather_rows(steps, self._observations, model, config, ranks) if steps else []


def update_ratios(
    observations: Observations, model: DistributedDataParallel, config: Config, ranks: Ranks
) -> Tensor:
    """``max norm(eta S) / norm(W0)`` over this rank's rows and chunks, of whole matrices.

    The squares of all layers are summed over the tensor-parallel ranks at once. Nothing is read
    back from the device.

    Returns:
        One float64 a fast layer of the model; 0 for those of other pipeline stages.
    """
    fast, layers = observations.state_squares, ttt_layers(config)
    ratios = torch.zeros(len(layers), dtype=torch.float64, device=ranks.device)
    if not fast:
        return ratios
    weights = [
        layer.mlp.linear_fc2.weight
        for layer in model.module.decoder.layers
        if layer.layer_number - 1 in fast
    ]
    wait_for(model, weights)
    parts = [torch.cat(fast[layer]).double() for layer in sorted(fast)]
    whole = torch.cat([*parts, *(squares(weight.detach()[None]) for weight in weights)])
    if ranks.groups.tp.size() > 1:
        dist.all_reduce(whole, group=ranks.groups.tp)
    *parts, slow = whole.split([*map(len, parts), len(weights)])
    most = torch.stack([part.max() for part in parts])
    first = layers.index(min(fast))  # the layers of a stage follow each other
    eta = observations.eta_factor * config.ttt.eta
    ratios[first : first + len(parts)] = update_ratio(most, slow, eta=eta)
    return ratios


def finite_grad_norm(optimizer: MegatronOptimizer) -> Callable[[], float]:
    """Make what replaces ``optimizer.get_grad_norm``, asked before a weight is changed.

    Returns:
        A function that gives the norm, equal on all ranks, or raises ``FloatingPointError`` where
        it is NaN or infinite. It costs no communication of its own.
    """
    measured: Callable[[], float] = optimizer.get_grad_norm

    def checked() -> float:
        grad_norm = float(measured())
        if not math.isfinite(grad_norm):
            raise FloatingPointError(_advice(f"gradient norm {grad_norm}"))
        return grad_norm

    return checked


def _advice(what: str) -> str:
    return f"{what}; lower optimizer.lr or ttt.eta, or bound the updates with ttt.clip"


def _rates(figures: StepFigures, config: Config) -> Row:
    """Return the target generator's learning rate where it has its own, and eta where it rises."""
    row: Row = {}
    if ttt_layers(config) and config.optimizer.target_lr_factor != 1:
        row["ttt/lr"] = config.optimizer.target_lr_factor * figures.lr
    if ttt_layers(config) and config.train.eta_warmup_steps:
        row["ttt/eta"] = eta_factor(config, figures.step) * config.ttt.eta
    return row


def _row(
    figures: StepFigures, total: float, counted: float, pairs: float, config: Config, ranks: Ranks
) -> Row:
    loss = total / max(counted, 1)
    if not math.isfinite(loss):
        raise FloatingPointError(_advice(f"step {figures.step}: loss {loss}"))
    tokens = config.train.global_batch_size * config.train.seq_length
    flops = training_flops(config, tokens=tokens, pairs=pairs)
    per_device = flops / figures.seconds / ranks.world_size / 1e12
    row: Row = {
        "step": figures.step,
        "loss": loss,
        "grad_norm": figures.grad_norm,
        "lr": figures.lr,
        **_rates(figures, config),
        "consumed_tokens": figures.consumed_tokens,
        "tokens_per_second": tokens / figures.seconds,
        "tflops_per_device": per_device,
        "step_time_s": figures.seconds,
        "peak_memory_bytes": figures.peak_memory_bytes,
    }
    if config.logging.peak_tflops_per_device is not None:
        row["mfu"] = per_device / config.logging.peak_tflops_per_device
    return row
