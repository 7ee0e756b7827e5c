"""Sessions and memories of ``transformers`` models as files (see ``inference/state_files.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.hf.cache import FastWeightCache
from megatron_ttt.hf.configuration import fast_layers, update_rule
from megatron_ttt.inference.fast_weight_state import Unfinished
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


def model_identity(model: Any) -> Identity:
    """Identify this model to its sessions and memories. Reads every weight once: keep it."""
    config = model.config
    return identity_of(
        update_rule(config),
        layers=fast_layers(config),
        weights=model.named_parameters(),
    )


def flush(model: Any, cache: FastWeightCache) -> None:
    """Write the unfinished chunk of every layer; the chunk grid starts anew behind it."""
    for layer, state in cache.fast_weights.items():
        mlp = model.get_decoder().layers[layer].mlp
        state.flush(mlp.down_proj.weight, mlp.make_write)


def save_session(
    path: Path | str,
    cache: FastWeightCache,
    identity: Identity,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write everything a generation has left behind.

    Args:
        cache: after the call that read the last token.
        identity: of the model (``model_identity``).
        tensors, extra: more to keep, given back by ``load_session``: the tokens, the sampler.

    Raises:
        StateFileError: the file cannot be written.
    """
    packed, places = pack_states(cache.fast_weights)
    lengths = []
    for index, layer in enumerate(cache.layers):
        packed[f"attention.{index}.keys"] = layer.keys
        packed[f"attention.{index}.values"] = layer.values
        lengths.append(layer.get_seq_length())
    packed |= {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
    about = {**places, "attention_lengths": lengths, "extra": dict(extra or {})}
    save_state(path, StateKind.SESSION, identity, packed, about)


def load_session(
    path: Path | str, model: Any, identity: Identity
) -> tuple[FastWeightCache, dict[str, Tensor], dict[str, Any]]:
    """Return the cache, tensors and extras of ``save_session``.

    Raises:
        StateFileError: the file is missing, damaged, no session, or of another model.
    """
    file = load_state(path, StateKind.SESSION, identity)
    cache = FastWeightCache(model.config)
    cache.fast_weights = unpack_states(file, cache.rule, device=model.device)
    try:
        _restore_attention(cache, file, model.device)
        extra = dict(file.extra["extra"])
    except (KeyError, IndexError, TypeError) as error:
        raise StateFileError(f"{path}: the session is incomplete: {error!r}") from error
    prefix = "extra."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in file.tensors.items()
        if name.startswith(prefix)
    }
    return cache, tensors, extra


def save_memory(
    path: Path | str, model: Any, cache: FastWeightCache, identity: Identity, *, rest: Unfinished
) -> None:
    """Write the fast weights alone, to be carried into fresh contexts.

    Args:
        rest: what becomes of the unfinished chunk; ``FLUSH`` writes it, also in ``cache``.

    Raises:
        StateFileError: nothing has been written yet, or the file cannot be written.
    """
    if rest is Unfinished.FLUSH:
        flush(model, cache)
    save_state(path, StateKind.MEMORY, identity, pack_memory(cache.fast_weights))


def load_memory(
    path: Path | str, model: Any, identity: Identity, *, batch: int = 1
) -> FastWeightCache:
    """Return a fresh cache at position 0 whose fast weights are the memory's, in every row.

    Raises:
        StateFileError: the file is missing, damaged, no memory, or of another model; or it holds
            several rows, and not ``batch``.
    """
    file = load_state(path, StateKind.MEMORY, identity)
    cache = FastWeightCache(model.config)
    cache.fast_weights = unpack_states(file, cache.rule, device=model.device)
    for state in cache.fast_weights.values():
        if state.batch not in (1, batch):
            raise StateFileError(f"{path}: holds {state.batch} rows, not 1 or {batch}")
        state.select([0] * batch if state.batch == 1 else range(batch))
    return cache


def _restore_attention(cache: FastWeightCache, file: StateFile, device: torch.device) -> None:
    for index, length in enumerate(file.extra["attention_lengths"]):
        keys = file.tensors[f"attention.{index}.keys"].to(device)
        values = file.tensors[f"attention.{index}.values"].to(device)
        layer = cache.layers[index]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):  # a sliding window holds less than it has seen
            layer.cumulative_length = length
