"""Megatron distributed checkpoints, imported or trained, on tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.reading import ReadingMode, ReadingRule, fitting_rule, reading_config
from megatron_ttt.config.schema import (
    ComputeConfig,
    ParallelConfig,
    PassConfig,
    TTTMode,
)
from megatron_ttt.conversion.opened import open_checkpoint
from megatron_ttt.data.tokenizers import ModelTokenizer
from megatron_ttt.inference.backend import Turn, UnfitModel
from megatron_ttt.inference.fast_weight_state import Unfinished
from megatron_ttt.inference.loaded import loaded
from megatron_ttt.inference.model_session import ModelSession
from megatron_ttt.inference.state_files import (
    Identity,
    StateFile,
    StateFileError,
    StateKind,
    identity_of,
    load_state,
    pack_memory,
    pack_states,
    save_state,
    unpack_states,
)
from megatron_ttt.model.gpt import InPlaceTTTModel
from megatron_ttt.training.distributed import Ranks


@contextmanager
def megatron_backend(
    path: Path,
    *,
    tp: int = 1,
    cp: int = 1,
    fast_weights: bool = True,
    rule: ReadingRule | None = None,
) -> Iterator[MegatronBackend]:
    """Load a checkpoint folder on every rank of the job.

    Args:
        path: an imported checkpoint, or a run's ``checkpoints/step_...``.
        tp, cp: tensor- and context-parallel ranks; the job has ``tp * cp``. Context parallelism
            reads long prompts faster and decodes no faster.
        fast_weights: False reads the same checkpoint without them.
        rule: another update rule than the checkpoint's; ``mode=off`` is ``fast_weights=False``.

    Raises:
        UnfitModel: the folder cannot be loaded, or the rule does not fit what it holds.
    """
    rule = rule or ReadingRule()
    with ExitStack() as stack:
        try:
            checkpoint = open_checkpoint(path)
            config = reading_config(
                checkpoint.model,
                fitting_rule(checkpoint.ttt, rule),
                train=PassConfig(seq_length=checkpoint.model.max_positions),
                parallel=ParallelConfig(tp=tp, cp=cp),
            )
            tokenizer = checkpoint.tokenizer()
            model, ranks = stack.enter_context(loaded(checkpoint, config))
        except ConfigError as error:
            raise UnfitModel(str(error).splitlines()[0]) from error
        reads = fast_weights and rule.mode is not ReadingMode.off
        mode = config.ttt.mode if reads else TTTMode.off
        yield MegatronBackend(model, config, ranks, mode=mode, tokenizer=tokenizer)


class MegatronBackend:
    """See ``backend.Backend``. Each tensor-parallel rank has a state file of its own.

    Context-parallel ranks hold the same states; the first of them writes the file.
    """

    def __init__(
        self,
        model: InPlaceTTTModel,
        config: ComputeConfig,
        ranks: Ranks,
        *,
        mode: TTTMode,
        tokenizer: ModelTokenizer,
    ) -> None:
        self.model, self.config, self.ranks, self.mode = model, config, ranks, mode
        self.device = ranks.device
        self.speaks = ranks.is_first
        self.writes_files = ranks.groups.cp.rank() == 0
        self.vocab_size = config.model.vocab_size
        self.max_positions = config.model.max_positions
        self.stop_tokens: frozenset[int] = frozenset()  # the tokenizer's end of document
        self.tokenizer = tokenizer

    @cached_property
    def identity(self) -> Identity:
        """Identify the model to its sessions and memories.

        Raises:
            StateFileError: there are no fast weights to save or load.
        """
        fast = self.new_reader(1).fast_weights
        if not fast:
            raise StateFileError("a session or memory holds fast weights, and they are off here")
        tp = self.ranks.groups.tp
        return identity_of(
            self.config.ttt,
            layers=fast,
            weights=self.model.named_parameters(),
            layout=f"tensor rank {tp.rank()} of {tp.size()}",
        )

    def own_file(self, path: Path) -> Path:
        """Return the file of this tensor-parallel rank; ``path`` itself with only one."""
        tp = self.ranks.groups.tp
        return path if tp.size() == 1 else path.with_name(f"{path.name}.tp{tp.rank()}")

    def new_reader(self, batch: int) -> ModelSession:
        """See ``Backend``, as for the methods below."""
        return ModelSession(
            self.model,
            self.config,
            self.ranks.groups,
            scan_group=self.ranks.scan_group,
            batch=batch,
            device=self.device,
            mode=self.mode,
        )

    def save_session(self, path: Path, reader: ModelSession, turn: Turn) -> None:
        tensors, about = pack_states(reader.fast_weights)
        for layer, cache in reader.attention.items():
            held = cache.held()
            if held is not None:
                tensors[f"attention.{layer}.keys"] = held[0]
                tensors[f"attention.{layer}.values"] = held[1]
        tensors |= {f"extra.{name}": tensor for name, tensor in turn.tensors().items()}
        about |= {"row_places": reader.places, "extra": turn.extra()}
        if self.writes_files:
            save_state(self.own_file(path), StateKind.SESSION, self.identity, tensors, about)

    def has_session(self, path: Path) -> bool:
        return self.own_file(path).exists()

    def load_session(self, path: Path) -> tuple[ModelSession, Turn]:
        own = self.own_file(path)
        file = load_state(own, StateKind.SESSION, self.identity)
        try:
            reader = self._restored(file)
            tensors = {"generator": file.tensors["extra.generator"]}
            return reader, Turn.restored(tensors, file.extra["extra"], own)
        except (KeyError, TypeError, AssertionError) as error:
            raise StateFileError(f"{own}: the session is incomplete: {error!r}") from error

    def save_memory(self, path: Path, reader: ModelSession, rest: Unfinished) -> None:
        if rest is Unfinished.FLUSH:
            reader.flush()
        packed = pack_memory(reader.fast_weights)
        if self.writes_files:
            save_state(self.own_file(path), StateKind.MEMORY, self.identity, packed)

    def load_memory(self, path: Path, batch: int) -> ModelSession:
        own = self.own_file(path)
        file = load_state(own, StateKind.MEMORY, self.identity)
        reader = self.new_reader(batch)
        reader.fast_weights = unpack_states(file, self.config.ttt, device=self.device)
        for state in reader.fast_weights.values():
            if state.batch not in (1, batch):
                raise StateFileError(f"{own}: holds {state.batch} rows, not 1 or {batch}")
            state.select([0] * batch if state.batch == 1 else range(batch))
        return reader

    def _restored(self, file: StateFile) -> ModelSession:
        places = file.extra["row_places"]
        reader = self.new_reader(len(places))
        reader.places = list(places)
        reader.fast_weights = unpack_states(file, self.config.ttt, device=self.device)
        for layer, cache in reader.attention.items():
            held: Any = tuple(
                file.tensors[f"attention.{layer}.{part}"].to(self.device)
                for part in ("keys", "values")
            )
            cache.restore(places, held)
        return reader
