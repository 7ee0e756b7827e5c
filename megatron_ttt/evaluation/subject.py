"""The model under evaluation: one set of weights, read with fast weights on and off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.checkpoints.run_files import CHECKPOINTS, checkpoint_folder
from megatron_ttt.config.derived import cp_tile
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.launcher import launched
from megatron_ttt.config.reading import fitting_rule, modes
from megatron_ttt.config.schema import (
    AttentionBackend,
    Bos,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    Toggle,
    TrainConfig,
    TTTConfig,
    TTTMode,
)
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.config.validate import validate
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.loading import load_hf_weights
from megatron_ttt.conversion.manifest import HF_SCHEME, described_model
from megatron_ttt.conversion.ttt_config import ttt_from_hf
from megatron_ttt.data.tokenizers import ModelTokenizer, Tokenizer
from megatron_ttt.evaluation.schema import EvaluationConfig
from megatron_ttt.evaluation.task import Reading
from megatron_ttt.inference.megatron_backend import model_tokenizer
from megatron_ttt.inference.model_session import ModelSession
from megatron_ttt.model.build import build_model
from megatron_ttt.model.gpt import InPlaceTTTModel
from megatron_ttt.model.initialize import Origin
from megatron_ttt.training.checkpoint import UnfitCheckpoint, load_model
from megatron_ttt.training.distributed import Ranks, distributed


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies on disk.

    Attributes:
        path: the folder with the weights.
        name: for headings and the default output folder.
        run: the folder of the run that wrote it, if one did.
        megatron: the opened Megatron folder; ``None`` for a Hugging Face folder.
        model, ttt: what it says it is.
        trained: ``data.*`` and ``train.*`` of the run that wrote it, as plain containers; empty
            where nothing is known.
    """

    path: Path
    name: str
    run: Path | None
    megatron: MegatronFolder | None
    model: ModelConfig
    ttt: TTTConfig
    trained: dict[str, dict]


def find_source(checkpoint: str) -> Source:
    """What ``checkpoint=`` names: a run, a checkpoint folder, or ``hf:`` and a folder.

    Raises:
        ConfigError: there is none, or it does not say what it is.
    """
    if checkpoint.startswith(HF_SCHEME):
        path = Path(checkpoint.removeprefix(HF_SCHEME))
        opened = HFFolder(path)
        model = model_from_hf(opened.config, name=path.name, where=str(path))
        ttt = ttt_from_hf(
            opened.config, layers=model.layers, where=str(path), tensors=opened.tensors
        )
        return Source(
            path=path,
            name=path.name,
            run=None,
            megatron=None,
            model=model,
            ttt=TTTConfig(mode=TTTMode.off) if ttt is None else ttt,
            trained={},
        )
    path = checkpoint_folder(Path(checkpoint))
    folder = MegatronFolder(path)
    model, ttt = described_model(folder)
    trained = folder.facts.get("config", {})
    parent = path.resolve().parent
    run = parent.parent if parent.name == CHECKPOINTS else None
    name = path.name if run is None else run.name
    return Source(path, name, run, folder, model, ttt, trained)


def reading_config(
    source: Source, config: EvaluationConfig, *, length: int, world_size: int
) -> Config:
    """The configuration under which a checkpoint is evaluated.

    Args:
        source: the checkpoint; the update rule is its own, changed by ``config.ttt``.
        config: the evaluation.
        length: tokens of the longest row.
        world_size: ranks of the job.

    Raises:
        ConfigError: a changed rule that does not fit the checkpoint.
    """
    model = replace(source.model, attention=AttentionBackend.torch)
    known = source.trained.get("data", {})
    flags = ("reset_attention", "reset_positions", "reset_fast_weights", "mask_document_end")
    return Config(
        run=RunConfig(name=source.name, dir="unused", resume="never"),
        model=model,
        ttt=fitting_rule(source.ttt, config.ttt),
        data=DataConfig(path="unused", **{flag: known[flag] for flag in flags if flag in known}),
        parallel=ParallelConfig(
            tp=config.parallel.tp,
            cp=config.parallel.cp,
            cp_order=config.parallel.cp_order,
            scan=config.parallel.scan,
            timeout_s=config.parallel.timeout_s,
            sequence_parallel=Toggle.off,
        ),
        train=TrainConfig(
            seq_length=length,
            global_batch_size=max(1, world_size // (config.parallel.tp * config.parallel.cp)),
            precision=config.precision,
            seed=config.seed,
        ),
    )


def check_reading(
    source: Source,
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
    checked = reading_config(source, config, length=length, world_size=world_size)
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
    faults = validate(checked, world_size, cuda=torch.cuda.is_available())
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
        model: in ``eval`` mode.
        modes: the readings that are compared, fast weights first.
        tokenizer: that belongs to it; ``None`` where nobody says.
        seed: of everything that is drawn.
    """

    source: Source
    config: Config
    ranks: Ranks
    model: InPlaceTTTModel
    modes: list[TTTMode]
    tokenizer: Tokenizer | None
    seed: int

    def new_session(self, mode: TTTMode, *, batch: int) -> ModelSession:
        """A session of ``batch`` rows that has read nothing."""
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
        """
        Raises:
            ConfigError: nobody says which tokenizer the model belongs to.
        """
        if self.tokenizer is None:
            message = f"{self.source.path} names none; give bytes, or a tokenizer's folder"
            raise ConfigError([Fault("data.tokenizer", None, message)])
        return self.tokenizer


@contextmanager
def open_subject(source: Source, config: EvaluationConfig, *, length: int) -> Iterator[Subject]:
    """Load the weights on every rank of the job.

    Args:
        source: the checkpoint.
        config: the evaluation.
        length: tokens of the longest row.

    Raises:
        ConfigError: the folder cannot be loaded, or its tokenizer cannot.
    """
    reading = reading_config(source, config, length=length, world_size=launched().world_size)
    tokenizer = _tokenizer(source, config.data.tokenizer, config.data.bos)
    # Advice about overlapping the reduction of gradients; reading has none.
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    with distributed(reading) as ranks:
        transformer = transformer_config(reading, device_is_cuda=ranks.device.type == "cuda")
        model = (
            build_model(reading, transformer, ranks.groups, Origin.LOADED).to(ranks.device).eval()
        )
        if source.megatron is None:
            tp = ranks.groups.tp
            load_hf_weights(source.path, model, reading, tp_rank=tp.rank(), tp_size=tp.size())
        else:
            try:
                load_model(source.path, model, ranks=ranks)
            except UnfitCheckpoint as error:
                raise ConfigError([Fault("checkpoint", source.path, str(error))]) from error
        yield Subject(
            source=source,
            config=reading,
            ranks=ranks,
            model=model,
            modes=modes(reading.ttt, config.ttt.mode),
            tokenizer=tokenizer,
            seed=config.seed,
        )


def _tokenizer(source: Source, wanted: str | None, bos: Bos | None) -> Tokenizer | None:
    if source.megatron is not None:
        known = model_tokenizer(source.megatron)
    else:
        has_tokenizer = (source.path / "tokenizer.json").is_file()
        known = ModelTokenizer(str(source.path) if has_tokenizer else None)
    try:
        return known.open(wanted, bos=bos)
    except ValueError as error:
        raise ConfigError([Fault("data.tokenizer", wanted or known.name, str(error))]) from error
