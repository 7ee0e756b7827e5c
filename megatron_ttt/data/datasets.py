"""Samples of fixed length from .bin/.idx pairs, on ``megatron.core.datasets``.

Megatron packs the shuffled documents of a split into samples of ``seq_length`` + 1 tokens (the
last token is the next sample's first), shuffles the samples by the seed, blends several datasets
by weight and caches its indices. What is ours is the order beyond one epoch: Megatron shuffles all
epochs of a run together, so that a run made longer sees another order, and a resume repeats and
loses samples. Here every epoch is a permutation drawn from (seed, epoch): sample ``i`` is the same
whatever the number of steps, ranks or micro-batches.
"""

import dataclasses
import re
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor

from megatron_ttt.data.checks import DatasetFacts, sequence_lengths


@dataclass(frozen=True)
class BlendPart:
    """One checked dataset of a blend; ``weight`` is its share of the samples, in any unit."""

    facts: DatasetFacts
    weight: float


class EpochDataset(GPTDataset):
    """One epoch of a :class:`GPTDataset`, repeated in fresh orders: as long as it has to be.

    Epoch 0 is Megatron's own order; sample ``i`` of epoch ``e`` is Megatron's sample
    ``permutation(seed, e)[i]``. The samples' cuts are the same in every epoch; the tokens after the
    last whole sample, fewer than ``seq_length``, are never drawn.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        # None: the cached indices are those of one epoch, whatever the length of the run
        super().__init__(indexed_dataset, dataset_path, indexed_indices, None, index_split, config)
        self.epoch_samples = super().__len__()
        self._length = max(num_samples or 0, self.epoch_samples)
        self._permutation: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def _build_document_sample_shuffle_indices(self) -> Any:
        names = ("document_index", "sample_index", "shuffle_index")
        _discard_damaged(self, self.index_split, names)
        return super()._build_document_sample_shuffle_indices()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """``{"text": [seq_length + 1] int64}``, padding and document ends as they are stored."""
        epoch, place = divmod(int(idx), self.epoch_samples)
        if epoch > 0:
            place = int(self._order(epoch)[place])
        sample = super().__getitem__(place)
        return {"text": torch.cat([sample["tokens"], sample["labels"][-1:]])}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._permutation[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.config.random_seed, epoch]))
            self._permutation = (epoch, generator.permutation(self.epoch_samples))
        return self._permutation[1]


class Blend(BlendedDataset):
    """Megatron's blend, which survives a start that was killed while it cached its indices."""

    def _build_indices(self) -> Any:
        _discard_damaged(self, self.split, ("dataset_index", "dataset_sample_index"))
        return super()._build_indices()


def _discard_damaged(dataset: Any, split: Split, names: Sequence[str]) -> None:
    """Delete cached indices that cannot be read: Megatron takes a file that exists for a good one.

    Only by the rank that would build them again; the others wait behind a barrier meanwhile.
    """
    folder = dataset.config.path_to_cache
    if folder is None or (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
        return
    for name in names:
        stem = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split.name}"
        path = Path(folder) / f"{stem}-{name}.npy"
        try:
            np.load(path, mmap_mode="r")
        except FileNotFoundError:
            continue
        except (ValueError, EOFError, OSError) as error:
            warnings.warn(f"{path} is damaged ({error}) and built again", stacklevel=2)
            path.unlink()


class _IndexKey:
    """What Megatron asks of a tokenizer here: to be part of the cached indices' name.

    ``pad`` is an id that no data has: Megatron would replace padding by token 0, and we keep it.
    ``layout`` ties the cached indices to the lengths of the documents, so that data prepared again
    under the same name never meets the indices of the old.
    """

    pad = -1
    vocab_size = None

    def __init__(self, eod: int, layout: str) -> None:
        self.eod = eod
        self.unique_identifiers = OrderedDict(eod=eod, layout=layout)


def split_range(facts: DatasetFacts, split: str, which: Split) -> tuple[int, int]:
    """First and last (exclusive) document of a split, rounded as Megatron rounds.

    Raises:
        ValueError: ``split`` is not up to three numbers that are not all 0.
    """
    number = r"\s*(\d+(\.\d*)?|\.\d+)\s*"
    if not re.fullmatch(f"{number}(,{number}){{0,2}}", split) or not re.search("[1-9]", split):
        raise ValueError(
            f"data.split={split!r}: give the shares of train, validation and test, e.g. '99,1,0'"
        )
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    bounds = matrix[which.value]
    if bounds is None:
        return 0, 0
    return round(bounds[0] * facts.documents), round(bounds[1] * facts.documents)


def samples_in_split(facts: DatasetFacts, split: str, which: Split, *, seq_length: int) -> int:
    """Whole samples in one epoch of a split, as Megatron counts them."""
    first, last = split_range(facts, split, which)
    tokens = int(np.sum(sequence_lengths(facts)[first:last], dtype=np.int64))
    return max(tokens - 1, 0) // seq_length


def build_samples(
    parts: Sequence[BlendPart],
    *,
    which: Split,
    split: str,
    samples: int,
    seq_length: int,
    seed: int,
    eod: int,
    cache_dir: str,
) -> torch.utils.data.Dataset[dict[str, Tensor]]:
    """At least ``samples`` samples of one split, blended by weight; an item is ``{"text": ...}``.

    Where torch.distributed is initialised every rank calls this at the same point: rank 0 builds
    and caches the indices, the others read them after a barrier (the cache is on a shared disk).

    Raises:
        ValueError: a dataset's split has fewer tokens than one sample.
    """
    weights = [part.weight / sum(p.weight for p in parts) for part in parts]
    datasets = []
    for part, weight in zip(parts, weights, strict=True):
        _require_one_sample(part.facts, split, which, seq_length)
        config = _dataset_config(part.facts, split, seq_length, seed, eod, cache_dir)
        # the blend draws ceil(share) of each; a margin as Megatron takes it for its own rounding
        wanted = samples if len(parts) == 1 else int(np.ceil(samples * weight * 1.005)) + 1
        datasets.append(
            BlendedMegatronDatasetBuilder.build_generic_dataset(
                EpochDataset,
                lambda: True,
                True,
                EpochDataset.build_low_level_dataset(part.facts.prefix, config),
                part.facts.prefix,
                np.arange(*split_range(part.facts, split, which), dtype=np.int32),
                wanted,
                which,
                config,
            )
        )
    if len(datasets) == 1:
        only: torch.utils.data.Dataset[dict[str, Tensor]] = datasets[0]
        return only
    if not torch.distributed.is_initialized():
        # megatron-core 0.16 asks for the rank when it caches a blend; without a cache it does not
        config = dataclasses.replace(config, path_to_cache=None)
    blend: torch.utils.data.Dataset[dict[str, Tensor]] = (
        BlendedMegatronDatasetBuilder.build_generic_dataset(
            Blend, lambda: True, True, datasets, weights, samples, config
        )
    )
    return blend


def _require_one_sample(facts: DatasetFacts, split: str, which: Split, seq_length: int) -> None:
    if samples_in_split(facts, split, which, seq_length=seq_length) == 0:
        first, last = split_range(facts, split, which)
        tokens = int(np.sum(sequence_lengths(facts)[first:last], dtype=np.int64))
        raise ValueError(
            f"{facts.prefix}: the {which.name} split (data.split={split}) has {tokens} tokens in"
            f" {last - first} of {facts.documents} documents, fewer than one sample"
            f" (train.seq_length={seq_length} and one more)"
        )


def _dataset_config(
    facts: DatasetFacts, split: str, seq_length: int, seed: int, eod: int, cache_dir: str
) -> GPTDatasetConfig:
    key: Any = _IndexKey(eod, facts.layout_key)
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([facts.prefix], None),
        split=split,
        path_to_cache=cache_dir,
        tokenizer=key,
        # masks and positions are ours (rows.py): computed for whole batches, not per sample
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
