"""The model under evaluation: one set of weights, read with fast weights on and off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ttt.config.derived import cp_tile
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.reading import fitting_rule, modes, reading_config
from megatron_ttt.config.schema import (
    Bos,
    Boundaries,
    ComputeConfig,
    ParallelConfig,
    PassConfig,
    TTTMode,
)
from megatron_ttt.config.to_megatron import compute_dtype
from megatron_ttt.config.validate import compute_faults
from megatron_ttt.conversion.opened import Checkpoint
from megatron_ttt.data.tokenizers import Tokenizer
from megatron_ttt.evaluation.schema import EvaluationConfig
from megatron_ttt.evaluation.task import Reading, Through
from megatron_ttt.inference.backend import UnfitModel
from megatron_ttt.inference.loaded import loaded
from megatron_ttt.inference.model_session import ModelSession
from megatron_ttt.inference.transformers_backend import TransformersBackend, write_rule
from megatron_ttt.training.distributed import Ranks, distributed


def evaluation_reading(
    source: Checkpoint, config: EvaluationConfig, *, length: int
) -> ComputeConfig:
    """Return the configuration under which a checkpoint is evaluated.

    Args:
        source: the checkpoint; the update rule is its own, changed by ``config.ttt``.
        config: the evaluation.
        length: tokens of the longest row.

    Raises:
        ConfigError: a changed rule that does not fit the checkpoint.
    """
    known, ranks = source.trained.get("data", {}), config.parallel
    flags = ("reset_attention", "reset_positions", "reset_fast_weights", "mask_document_end")
    return reading_config(
        source.model,
        fitting_rule(source.ttt, config.ttt),
        data=Boundaries(**{flag: known[flag] for flag in flags if flag in known}),
        parallel=ParallelConfig(
            tp=ranks.tp,
            cp=ranks.cp,
            cp_order=ranks.cp_order,
            scan=ranks.scan,
            timeout_s=ranks.timeout_s,
        ),
        train=PassConfig(seq_length=length, precision=config.precision, seed=config.seed),
    )


def check_reading(
    source: Checkpoint,
    config: EvaluationConfig,
    *,
    reading: Reading,
    length: int,
    key: str,
    world_size: int,
) -> None:
    """Whether rows of a length can be read by the ranks of the job.

    Args:
        source: the checkpoint.
        config: the evaluation.
        reading: how the task reads.
        length: tokens of a row.
        key: which configuration key the length came from.
        world_size: ranks of the job.

    Raises:
        ConfigError: one fault per mistake.
    """
    checked = evaluation_reading(source, config, length=length)
    if length > source.model.max_positions and not config.beyond_positions:
        message = (
            f"{source.name} has {source.model.max_positions} positions;"
            " beyond_positions=true reads on regardless"
        )
        raise ConfigError([Fault(key, length, message)])
    if reading is Reading.SESSION:  # what does not tile is read by every rank
        tile = cp_tile(checked)
        checked.train.seq_length = -(-length // tile) * tile
    positions = max(checked.train.seq_length, checked.model.max_positions)
    checked = replace(checked, model=replace(checked.model, max_positions=positions))
    faults = compute_faults(checked, world_size, cuda=torch.cuda.is_available())
    if faults:
        renamed = [replace(f, key=key) if f.key == "train.seq_length" else f for f in faults]
        raise ConfigError(renamed)


@dataclass
class Subject:
    """A loaded model on this rank.

    Attributes:
        source: where it came from.
        config: how it is read (``ttt.mode`` as trained).
        ranks: this rank among the others.
        model: in ``eval`` mode; Megatron's or, with ``through=transformers``, the export's own.
        modes: the readings that are compared, fast weights first.
        tokenizer: that belongs to it; ``None`` where nobody says.
        seed: of everything that is drawn.
    """

    source: Checkpoint
    config: ComputeConfig
    ranks: Ranks
    model: Any
    modes: list[TTTMode]
    tokenizer: Tokenizer | None
    seed: int
    through: Through = Through.megatron

    def new_session(self, mode: TTTMode, *, batch: int) -> ModelSession:
        """Return a session of ``batch`` rows that has read nothing."""
        return ModelSession(
            self.model,
            self.config,
            self.ranks.groups,
            scan_group=self.ranks.scan_group,
            batch=batch,
            device=self.ranks.device,
            mode=mode,
        )

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ConfigError: nobody says which tokenizer the model belongs to.
        """
        if self.tokenizer is None:
            message = f"{self.source.path} names none; give bytes, or a tokenizer's folder"
            raise ConfigError([Fault("data.tokenizer", None, message)])
        return self.tokenizer


@contextmanager
def open_subject(source: Checkpoint, config: EvaluationConfig, *, length: int) -> Iterator[Subject]:
    """Load the weights on every rank of the job.

    Args:
        source: the checkpoint.
        config: the evaluation.
        length: tokens of the longest row.

    Raises:
        ConfigError: the folder cannot be loaded, or its tokenizer cannot.
    """
    reading = evaluation_reading(source, config, length=length)
    tokenizer = _tokenizer(source, config.data.tokenizer, config.data.bos)
    served = config.through is Through.transformers
    with (_served if served else loaded)(source, reading) as (model, ranks):
        yield Subject(
            source=source,
            config=reading,
            ranks=ranks,
            model=model,
            modes=modes(reading.ttt, config.ttt.mode),
            tokenizer=tokenizer,
            seed=config.seed,
            through=config.through,
        )


@contextmanager
def _served(source: Checkpoint, config: ComputeConfig) -> Iterator[tuple[Any, Ranks]]:
    """Load an exported model through the classes that serve it.

    Raises:
        ConfigError: it is a Megatron checkpoint, there are several processes, or its classes
            cannot load it.
    """
    if source.is_megatron:
        message = "is a Megatron checkpoint; export it, or give through=megatron"
        raise ConfigError([Fault("checkpoint", source.path, message)])
    with distributed(config) as ranks:
        if ranks.world_size > 1:
            message = f"transformers' classes run in one process, the job has {ranks.world_size}"
            raise ConfigError([Fault("through", "transformers", message)])
        dtype = compute_dtype(config, device_is_cuda=ranks.device.type == "cuda")
        try:
            backend = TransformersBackend(source.path, dtype=dtype, device=ranks.device)
        except UnfitModel as error:
            raise ConfigError([Fault("checkpoint", source.path, str(error))]) from error
        write_rule(backend.model.config, config.ttt)
        yield backend.model, ranks


def _tokenizer(source: Checkpoint, wanted: str | None, bos: Bos | None) -> Tokenizer | None:
    known = source.tokenizer()
    try:
        return known.open(wanted, bos=bos)
    except ValueError as error:
        raise ConfigError([Fault("data.tokenizer", wanted or known.name, str(error))]) from error
