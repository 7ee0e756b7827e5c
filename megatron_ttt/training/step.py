"""One training step on Megatron's schedules, and the same step without gradients for validation.

Shape letters: B rows of a micro-batch, T tokens of a whole row, L tokens of this rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.schema import ComputeConfig, TTTMode
from megatron_ttt.data.batches import Batch
from megatron_ttt.fast_weights.upload import upload
from megatron_ttt.model.sequence_layout import (
    ScanSettings,
    SequenceLayout,
    places_in_documents,
    sequence_layout,
    take_ranges,
)
from megatron_ttt.parallel.pending import ScanRecord
from megatron_ttt.training.distributed import Ranks


@dataclass
class Observations:
    """What the micro-batches of one step leave behind on one rank.

    Attributes:
        has_norms: whether the states' norms were observed, on every rank alike.
        eta_factor: share of ``ttt.eta`` that was computed with.
        state_squares: per fast layer, squared norms ``[B * chunks]`` of local state shards.
        pairs: (query, key) pairs that attention must visit in one layer, on this rank's rows.
        scans: per micro-batch, a record of every scan that was waited for.
        sample_ids: numbers of the rows read, in reading order.
    """

    has_norms: bool = False
    eta_factor: float = 1.0
    state_squares: dict[int, list[Tensor]] = field(default_factory=dict)
    pairs: int = 0
    scans: list[list[ScanRecord]] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)

    def add(self, layout: SequenceLayout) -> None:
        """Take over what a micro-batch's layers wrote into its layout."""
        for layer, squares in layout.state_squares.items():
            self.state_squares.setdefault(layer, []).append(squares.flatten())
        self.scans.append(layout.scans)  # the backward will add to it

    @property
    def scan_exposed_s(self) -> float:
        """Seconds that this rank stood still for scans, forward and backward."""
        return sum(record.exposed_s for records in self.scans for record in records)


@dataclass(frozen=True)
class LossSum:
    """Sum of token losses and number of counted tokens, over the global batch."""

    total: float
    tokens: int

    @classmethod
    def over(cls, ranks: Ranks, loss_sums: Tensor) -> "LossSum":
        """Add up what :func:`run_micro_batches` returned on every rank; all ranks call it."""
        total, tokens = ranks.sum_over_data_and_stages(loss_sums.clone()).tolist()
        return cls(total, int(tokens))

    @property
    def mean(self) -> float:
        """Loss per counted token, in nats."""
        return self.total / max(self.tokens, 1)


class ForwardStep:
    """Megatron's ``forward_step_func`` for one configuration."""

    def __init__(
        self,
        config: ComputeConfig,
        ranks: Ranks,
        *,
        scan: ScanSettings,
        mode: TTTMode,
        wants_norms: bool = False,
        eta_factor: float = 1.0,
    ) -> None:
        """Prepare a step.

        Args:
            config, ranks: what is computed, and where.
            scan: how states travel.
            mode: may switch the fast weights of a model that has them off for this step.
            wants_norms: whether the states' norms are observed.
            eta_factor: share of ``ttt.eta`` that layers compute with.
        """
        self.config = config
        self.ranks = ranks
        self.scan = scan
        fast = bool(ttt_layers(config)) and mode is TTTMode.in_place
        self.chunk_size = config.ttt.chunk_size if fast else None
        self.wants_norms = fast and wants_norms
        self.observations = Observations(has_norms=self.wants_norms, eta_factor=eta_factor)

    def __call__(
        self, data: Iterator[Batch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """One micro-batch through this pipeline stage; returns the output and the loss function."""
        batch = next(data)
        device = self.ranks.device
        layout = self.layout(batch)
        tokens, labels, counted = (
            take_ranges(upload(rows, device), layout.ranges)
            for rows in (batch.tokens_BT, batch.labels_BT, batch.loss_mask_BT)
        )
        output = model(
            input_ids=tokens,
            position_ids=layout.positions,
            attention_mask=None,
            labels=labels,
            packed_seq_params=layout,
        )
        self.observations.add(layout)
        self.observations.sample_ids += batch.sample_ids_B.tolist()
        self.observations.pairs += visible_pairs(
            batch.document_starts_BT if self.config.data.reset_attention else None,
            rows=batch.tokens_BT.shape[0],
            length=batch.tokens_BT.shape[1],
            window=self.config.model.sliding_window,
        )
        return output, partial(_token_losses, counted)

    def layout(self, batch: Batch) -> SequenceLayout:
        """Return this rank's layout of a micro-batch."""
        data = self.config.data
        return sequence_layout(
            document_starts=batch.document_starts_BT,
            padding=batch.padding_BT,
            chunk_size=self.chunk_size,
            decay=self.config.ttt.decay,
            mask_attention=data.reset_attention,
            window=self.config.model.sliding_window,
            reset_positions=data.reset_positions,
            reset_fast_weights=data.reset_fast_weights,
            scan=self.scan,
            device=self.ranks.device,
            wants_norms=self.wants_norms,
            eta_factor=self.observations.eta_factor,
        )


def _token_losses(counted: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of counted losses, their number, both for the report).

    With three values Megatron divides gradients once by the number of counted tokens of the global
    batch, summed over micro-batches, dp and cp.
    """
    total = (losses.float() * counted).sum()
    number = counted.sum().to(torch.int)
    return total, number, torch.stack([total.detach().double(), number.double()])


def visible_pairs(
    document_starts: Tensor | None, *, rows: int, length: int, window: int | None
) -> int:
    """(query, key) pairs that causal attention visits in one layer over whole rows.

    Args:
        document_starts: ``[rows, length]`` bool where attention stays within documents, else None.
        window: keys a query sees at most, itself included.
    """
    if document_starts is None:
        seen = torch.arange(1, length + 1).expand(rows, length)
    else:
        seen = places_in_documents(document_starts) + 1
    return int(seen.clamp(max=window).sum() if window is not None else seen.sum())


def run_micro_batches(
    step: ForwardStep,
    model: DistributedDataParallel,
    data: Iterator[Batch],
    *,
    micro_batches: int,
    forward_only: bool,
) -> Tensor:
    """Run one global batch through Megatron's schedule.

    Returns:
        ``[2]`` float64: the sum of this rank's counted token losses and their number; zeros on
        ranks that compute no loss.
    """
    config = step.config
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=data,
        model=[model],
        num_microbatches=micro_batches,
        seq_length=config.train.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    totals = torch.zeros(2, dtype=torch.float64, device=step.ranks.device)
    if step.ranks.is_last_stage:
        totals += torch.stack(reports).sum(dim=0)
    return totals
