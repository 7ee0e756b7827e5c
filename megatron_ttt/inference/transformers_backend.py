"""Exported checkpoints, and plain ones, through the ``transformers`` classes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.reading import ReadingMode, ReadingRule, fitting_rule
from megatron_ttt.config.schema import TTTConfig, TTTMode
from megatron_ttt.conversion.hf_config import TTT_SUFFIX
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.ttt_config import hf_from_ttt, ttt_from_hf
from megatron_ttt.data.tokenizers import ModelTokenizer
from megatron_ttt.hf import modeling
from megatron_ttt.hf.auto_map import CLASSES
from megatron_ttt.hf.reader import TransformersReader
from megatron_ttt.hf.sessions import (
    load_memory,
    load_session,
    model_identity,
    save_memory,
    save_session,
)
from megatron_ttt.inference.backend import Turn, UnfitModel
from megatron_ttt.inference.fast_weight_state import Unfinished
from megatron_ttt.inference.state_files import Identity, StateFileError

# Checkpoints of the published reference implementation keep the plain model's type.
_PUBLISHED: dict[str, Any] = {
    kind.removesuffix(TTT_SUFFIX): getattr(modeling, f"{name}ForCausalLM")
    for kind, name in CLASSES.items()
}
# The keys of a configuration that a ``ReadingRule`` can change.
_RULE_KEYS = ("ttt_lr", "ttt_chunk", "ttt_decay", "ttt_clip_mode", "ttt_clip_bound")


def change_rule(config: Any, rule: ReadingRule, *, where: str) -> None:
    """Write a changed update rule into a loaded model's configuration.

    Args:
        config: of a model of ours, or of a plain one; read anew by every fresh cache.
        rule: null keys stay as they are; ``mode`` is not looked at.
        where: named in errors.

    Raises:
        ConfigError: the rule does not fit the model.
    """
    layers = config.num_hidden_layers
    known = ttt_from_hf(config.to_dict(), layers=layers, where=where)
    changed = fitting_rule(known or TTTConfig(mode=TTTMode.off), rule)
    if known is not None:
        write_rule(config, changed)


def write_rule(config: Any, rule: TTTConfig) -> None:
    """Give a loaded model's configuration what a ``ReadingRule`` can change of an update rule."""
    if rule.mode is not TTTMode.off:
        keys = hf_from_ttt(rule, layers=config.num_hidden_layers)
        for key in _RULE_KEYS:
            setattr(config, key, keys[key])


def _class_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the class that reads a folder with its fast weights, and keys its file lacks.

    Raises:
        ConfigError: the folder has fast weights that no class would read.
    """
    opened = HFFolder(folder)
    config = opened.config
    count = config.get("num_hidden_layers")
    layers = count if isinstance(count, int) else 0
    rule = ttt_from_hf(config, layers=layers, where=str(folder), tensors=opened.tensors)
    if rule is None or str(config.get("model_type")).endswith(TTT_SUFFIX):
        return AutoModelForCausalLM, {}
    kind = _PUBLISHED.get(str(config.get("model_type")))
    if kind is None:
        message = f"no class reads its fast weights; known: {', '.join(_PUBLISHED)}"
        raise ConfigError([Fault(f"{folder}: model_type", config.get("model_type"), message)])
    return kind, {"ttt_layers": rule.layers, "ttt_conv": rule.conv.value, "ttt_proj": rule.proj}


class TransformersBackend:
    """See ``backend.Backend``."""

    speaks = True

    def __init__(
        self,
        folder: Path,
        *,
        fast_weights: bool = True,
        dtype: torch.dtype | str = "auto",
        device: torch.device | None = None,
        rule: ReadingRule | None = None,
    ) -> None:
        """Load the model.

        Args:
            folder: with ``config.json`` and safetensors.
            fast_weights: False reads the same checkpoint without them.
            dtype: of weights and activations; "auto": as stored.
            device: None: a GPU where there is one.
            rule: another update rule than the model's; ``mode=off`` is ``fast_weights=False``.

        Raises:
            UnfitModel: the folder cannot be loaded, or the rule does not fit what it holds.
        """
        rule = rule or ReadingRule()
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            kind, keys = _class_of(folder)
            model = kind.from_pretrained(folder, dtype=dtype, **keys)
        except ConfigError as error:
            raise UnfitModel(str(error).splitlines()[0]) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnfitModel(f"{folder}: cannot be loaded: {reason}") from error
        try:
            change_rule(model.config, rule, where=str(folder))
        except ConfigError as error:
            raise UnfitModel(str(error).splitlines()[0]) from error
        self.model: Any = model.to(self.device).eval()
        reads = fast_weights and rule.mode is not ReadingMode.off
        self.fast_weights = reads and bool(getattr(model.config, "ttt_mode", False))
        if hasattr(model.config, "ttt_mode"):
            model.config.ttt_mode = self.fast_weights
        self.vocab_size: int = model.config.vocab_size
        self.max_positions: int = model.config.max_position_embeddings
        stop = model.generation_config.eos_token_id
        self.stop_tokens = frozenset([stop] if isinstance(stop, int) else stop or [])
        has_tokenizer = (folder / "tokenizer.json").is_file()
        self.tokenizer = ModelTokenizer(str(folder) if has_tokenizer else None)

    @cached_property
    def identity(self) -> Identity:
        """Identify the model to its sessions and memories.

        Raises:
            StateFileError: there are no fast weights to save or load.
        """
        if not self.fast_weights:
            raise StateFileError("a session or memory holds fast weights, and they are off here")
        return model_identity(self.model)

    def new_reader(self, batch: int) -> TransformersReader:
        """See ``Backend``, as for the methods below."""
        return TransformersReader(self.model, batch=batch)

    def save_session(self, path: Path, reader: TransformersReader, turn: Turn) -> None:
        save_session(
            path,
            reader.cache,
            self.identity,
            tensors={**turn.tensors(), "mask": reader.mask_BP},
            extra={**turn.extra(), "places": reader.places},
        )

    def has_session(self, path: Path) -> bool:
        return path.exists()

    def load_session(self, path: Path) -> tuple[TransformersReader, Turn]:
        cache, tensors, extra = load_session(path, self.model, self.identity)
        turn = Turn.restored(tensors, extra, path)
        reader = TransformersReader(self.model, batch=len(turn.unread), cache=cache)
        try:
            reader.mask_BP, reader.places = tensors["mask"], list(extra["places"])
        except KeyError as error:
            raise StateFileError(f"{path}: the session is incomplete: {error!r}") from error
        return reader, turn

    def save_memory(self, path: Path, reader: TransformersReader, rest: Unfinished) -> None:
        save_memory(path, self.model, reader.cache, self.identity, rest=rest)

    def load_memory(self, path: Path, batch: int) -> TransformersReader:
        cache = load_memory(path, self.model, self.identity, batch=batch)
        return TransformersReader(self.model, batch=batch, cache=cache)
