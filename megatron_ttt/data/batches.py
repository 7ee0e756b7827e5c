"""Micro-batches in an order that depends on the seed and the consumed samples, and nothing else.

Sample ``i`` of the run is the same text whatever the ranks; a step takes the samples
``consumed ... consumed + global_batch_size - 1``, and data-parallel rank ``r`` the ``r``-th block
of ``micro_batch_size`` in every ``micro_batch_size * dp_size`` of them (as Megatron's own sampler).
So a run resumed at another data-parallel size or micro-batch size repeats and loses nothing.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_ttt.config.schema import Config
from megatron_ttt.data.datasets import BlendPart, build_samples, samples_in_split
from megatron_ttt.data.rows import Batch, make_batch
from megatron_ttt.data.sources import Source, cache_dir
from megatron_ttt.data.tokenizers import TokenizerIdentity
from megatron_ttt.data.workers import leave_with_parent_alone

__all__ = ["Batch", "DataStreams", "MicroBatchSampler", "build_data", "make_batch"]


@dataclass(frozen=True)
class DataStreams:
    """What training reads.

    ``train_iterator`` yields this rank's micro-batches from ``consumed_samples`` on and ends with
    the run. ``validation_iterator()`` starts the same validation micro-batches again at each call;
    None when the run validates nothing. ``tokenizer`` gives ``eod``, ``pad`` and ``vocab_size`` of
    the data. Samples per epoch: whole rows in one pass over a split.
    """

    train_iterator: Iterator[Batch]
    validation_iterator: Callable[[], Iterator[Batch]] | None
    tokenizer: TokenizerIdentity
    train_samples_per_epoch: int
    validation_samples_per_epoch: int


class MicroBatchSampler(Sampler[list[int]]):
    """Sample numbers of one data-parallel rank's micro-batches, from ``start`` up to ``stop``.

    Raises:
        ValueError: ``stop - start`` is not a multiple of ``micro_batch_size * dp_size`` (a rank
            would be left without a micro-batch), or a number is out of range.
    """

    def __init__(
        self, *, start: int, stop: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        self._stride = micro_batch_size * dp_size
        if micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(f"micro batch of {micro_batch_size} on rank {dp_rank} of {dp_size}")
        if not 0 <= start <= stop:
            raise ValueError(f"samples {start} to {stop}: the run is already past its end")
        if (stop - start) % self._stride:
            raise ValueError(
                f"{stop - start} samples ({start} to {stop}) do not divide into micro-batches of"
                f" {micro_batch_size} on {dp_size} data-parallel ranks"
            )
        self._start, self._stop = start, stop
        self._micro_batch_size, self._offset = micro_batch_size, dp_rank * micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self._start + self._offset, self._stop, self._stride):
            yield list(range(first, first + self._micro_batch_size))

    def __len__(self) -> int:
        return (self._stop - self._start) // self._stride


class _Numbered(Dataset[tuple[int, Tensor]]):
    """Samples with their numbers, so that the collated batch can say which they are."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self._samples[index]["text"]


@dataclass(frozen=True)
class _Collate:
    """Rows [R] of one micro-batch to a :class:`Batch`; runs in the loader's workers."""

    eod: int
    pad: int | None
    mask_document_end: bool

    def __call__(self, rows: list[tuple[int, Tensor]]) -> Batch:
        return make_batch(
            torch.stack([text for _, text in rows]),
            [number for number, _ in rows],
            eod=self.eod,
            pad=self.pad,
            mask_document_end=self.mask_document_end,
        )


def build_data(
    config: Config,
    source: Source,
    *,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    train_samples: int,
    is_builder: bool,
) -> DataStreams:
    """Build or read the cached indices, and start reading at ``consumed_samples``.

    Every rank calls this at the same point. ``is_builder`` is true on global rank 0 alone.

    Args:
        source: the checked data of ``config``.
        train_samples: samples of the whole run, those that were consumed already included.

    Raises:
        ValueError: in one line, whatever is wrong with the data or the numbers.
    """
    train = config.train
    make_loader = _LoaderFactory(config, source, dp_rank=dp_rank, dp_size=dp_size)
    validates = config.validation.interval is not None
    validation_samples = config.validation.batches * train.global_batch_size if validates else 0
    per_epoch = [_samples_per_epoch(source, config, which) for which in (Split.train, Split.valid)]
    if is_builder and validates and 0 < per_epoch[1] < validation_samples:
        warnings.warn(
            f"the validation split holds {per_epoch[1]} samples, fewer than the"
            f" {validation_samples} of validation.batches={config.validation.batches} times"
            f" train.global_batch_size={train.global_batch_size}: some count twice",
            stacklevel=2,
        )
    loader = make_loader(Split.train, consumed_samples, train_samples)
    validation = make_loader(Split.valid, 0, validation_samples) if validates else None
    return DataStreams(
        train_iterator=iter(loader),
        validation_iterator=None if validation is None else lambda: iter(validation),
        tokenizer=source.tokenizer,
        train_samples_per_epoch=per_epoch[0],
        validation_samples_per_epoch=per_epoch[1],
    )


def _samples_per_epoch(source: Source, config: Config, which: Split) -> int:
    return sum(
        samples_in_split(facts, config.data.split, which, seq_length=config.train.seq_length)
        for facts, _ in source.parts
    )


class _LoaderFactory:
    """Loaders over one split, from one sample to another, for one data-parallel rank."""

    def __init__(self, config: Config, source: Source, *, dp_rank: int, dp_size: int) -> None:
        self._config, self._source = config, source
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __call__(self, which: Split, start: int, stop: int) -> DataLoader[Batch]:
        train, data = self._config.train, self._config.data
        sampler = MicroBatchSampler(
            start=start,
            stop=stop,
            micro_batch_size=train.micro_batch_size,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
        )
        tokenizer = self._source.tokenizer
        samples = build_samples(
            [BlendPart(facts, share) for facts, share in self._source.parts],
            which=which,
            split=data.split,
            samples=stop,
            seq_length=train.seq_length,
            seed=train.seed,
            eod=tokenizer.eod,
            cache_dir=cache_dir(data),
        )
        loader: DataLoader[Any] = DataLoader(
            _Numbered(samples),
            batch_sampler=sampler,
            num_workers=data.workers,
            collate_fn=_Collate(
                eod=tokenizer.eod,
                pad=tokenizer.pad,
                mask_document_end=data.mask_document_end,
            ),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_with_parent_alone,
            # Children of this process, whatever the default: a server that forks them would be
            # ended by a signal to all processes of the run, and they with it.
            multiprocessing_context="fork" if data.workers > 0 else None,
            # the workers of the validation loader wait for its next round
            persistent_workers=data.workers > 0,
            # its own generator: the loader would draw a seed from the global one at every start
            generator=torch.Generator().manual_seed(train.seed),
        )
        return loader
