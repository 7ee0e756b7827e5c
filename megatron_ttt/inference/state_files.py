"""Sessions and memories as files: one safetensors file, its description JSON in the header.

A *session* is everything that reading has left behind (fast weights, unfinished chunks, key/value
cache, places, sampler) and continues where it stopped. A *memory* is the fast weights alone, to be
carried into a fresh context. Both belong to one model and one update rule, which loading checks.

Nothing is unpickled. A file is written beside its place, synced, and renamed, so it is whole or
absent; a checksum of its tensors finds damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ttt.fast_weights.write_rules import TokenInputs
from megatron_ttt.files import replacing
from megatron_ttt.inference.fast_weight_state import FastWeightState
from megatron_ttt.rule import AS_PUBLISHED, UpdateRule, reads_hidden_apart, rule_identity

_FORMAT = "megatron_ttt state 1"
TOKEN_TENSORS = ("keys", "source", "hidden")  # of an unfinished chunk; the last where it is apart
# Files of exported models once named the target source as their config.json does.
HF_TARGETS = {"input_embed": "input_embeddings"}


class StateFileError(ValueError):
    """A state file that is missing, damaged, or of another model; the message is one line."""


class StateKind(StrEnum):
    SESSION = "session"
    MEMORY = "memory"


@dataclass(frozen=True)
class Identity:
    """What a state belongs to. States of another identity are refused, naming what differs.

    ``weights``: hexadecimal digest of all of the model's weights. ``layers``: of the fast weights,
    from 0. The rest is the update rule.
    """

    weights: str
    layers: tuple[int, ...]
    target: str
    chunk_size: int
    eta: float
    decay: float
    clip: str
    normalize: str
    write: str = "plain"  # files of before there were others do not say, here and below
    conv: str = AS_PUBLISHED
    layout: str = "1 rank"

    def differences(self, other: Identity) -> list[str]:
        """One phrase for each field in which ``other`` differs, for an error message."""
        mine, theirs = asdict(self), asdict(other)
        return [
            "other weights" if name == "weights" else f"{name} {theirs[name]}, here {mine[name]}"
            for name in mine
            if mine[name] != theirs[name]
        ]


@dataclass
class StateFile:
    """A loaded file: tensors by name, and the JSON description that was saved with them."""

    kind: StateKind
    identity: Identity
    tensors: dict[str, Tensor]
    extra: dict[str, Any]


def identity_of(
    rule: UpdateRule,
    *,
    layers: Iterable[int],
    weights: Iterable[tuple[str, Tensor]],
    layout: str = "1 rank",
) -> Identity:
    """Return the identity of a model's fast weights; reads every weight once."""
    return Identity(
        weights=digest_tensors(weights),
        layers=tuple(sorted(layers)),
        layout=layout,
        **rule_identity(rule),
    )


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_states(states: Mapping[int, FastWeightState]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of all layers' states, to be saved in a session."""
    tensors: dict[str, Tensor] = {}
    for layer, state in states.items():
        if state.state_BDF is not None:
            tensors[f"fast_weights.{layer}.state"] = state.state_BDF
        unfinished = state.unfinished()
        if unfinished is not None:
            for name, tensor in zip(TOKEN_TENSORS, unfinished, strict=False):
                tensors[f"fast_weights.{layer}.{name}"] = tensor
    places = {str(layer): state.places for layer, state in states.items()}
    pending = {str(layer): state.pending for layer, state in states.items()}
    return tensors, {"places": places, "pending": pending}


def unpack_states(
    file: StateFile, rule: UpdateRule, *, device: torch.device | str
) -> dict[int, FastWeightState]:
    """Return the layers' states of a session, or of a memory as they enter a fresh context.

    Raises:
        StateFileError: tensors or places are missing or do not fit together.
    """
    states: dict[int, FastWeightState] = {}
    try:
        for layer in file.identity.layers:
            states[layer] = _unpack_layer(file, rule, layer, device)
    except (KeyError, TypeError, IndexError, AssertionError, ValueError) as error:
        raise StateFileError(f"the {file.kind} is incomplete: {error!r}") from error
    return states


def _unpack_layer(
    file: StateFile, rule: UpdateRule, layer: int, device: torch.device | str
) -> FastWeightState:
    name = f"fast_weights.{layer}"
    state = file.tensors.get(f"{name}.state")
    unfinished = None
    if file.kind is StateKind.MEMORY:
        if state is None:
            raise ValueError(f"layer {layer} has no state")
        places = pending = [0] * state.shape[0]
    else:
        places, pending = file.extra["places"][str(layer)], file.extra["pending"][str(layer)]
        if any(pending):
            names = TOKEN_TENSORS if reads_hidden_apart(rule) else TOKEN_TENSORS[:2]
            unfinished = TokenInputs(*(file.tensors[f"{name}.{part}"].to(device) for part in names))
    restored = FastWeightState(rule, batch=len(places))
    restored.restore(
        places=places,
        pending=pending,
        state_BDF=None if state is None else state.to(device),
        unfinished=unfinished,
    )
    return restored


def save_state(
    path: Path | str,
    kind: StateKind,
    identity: Identity,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a state file; an existing one is replaced only by a complete new one.

    Raises:
        StateFileError: the file cannot be written.
    """
    path = Path(path)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {
        "format": _FORMAT,
        "kind": kind.value,
        "identity": asdict(identity),
        "checksum": digest_tensors(whole.items()),
        "extra": dict(extra or {}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            save_file(whole, beside, metadata={"megatron_ttt": json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise StateFileError(f"{path}: cannot be written: {error}") from error


def load_state(path: Path | str, kind: StateKind, identity: Identity) -> StateFile:
    """Read a state file and check that it is whole, of this kind, and of this model.

    Raises:
        StateFileError: it is not; the message says in one line why.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise StateFileError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = str(error).replace("\n", " ")
        raise StateFileError(f"{path}: not a readable state file: {reason}") from error
    try:
        description = json.loads(header["megatron_ttt"])
        if description["format"] != _FORMAT:
            raise StateFileError(f"{path}: format {description['format']!r}, not {_FORMAT!r}")
        found_kind = StateKind(description["kind"])
        saved = description["identity"]
        target = HF_TARGETS.get(saved["target"], saved["target"])
        saved_identity = Identity(**{**saved, "layers": tuple(saved["layers"]), "target": target})
        checksum, extra = description["checksum"], description["extra"]
    except StateFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise StateFileError(f"{path}: not a state file of megatron_ttt ({error!r})") from error
    if checksum != digest_tensors(tensors.items()):
        raise StateFileError(f"{path}: damaged: its tensors do not match their checksum")
    if found_kind is not kind:
        raise StateFileError(f"{path}: a {found_kind}, where a {kind} is needed")
    different = identity.differences(saved_identity)
    if kind is StateKind.MEMORY:
        different = [text for text in different if not text.startswith("layout ")]
    if different:
        raise StateFileError(f"{path}: belongs to another model: {'; '.join(different)}")
    return StateFile(kind, saved_identity, tensors, extra)


def pack_memory(states: Mapping[int, FastWeightState]) -> dict[str, Tensor]:
    """Return the fast weights alone; flush first what the unfinished chunks hold, or lose it.

    Raises:
        StateFileError: no chunk has been written yet.
    """
    tensors: dict[str, Tensor] = {}
    for layer, state in states.items():
        if state.state_BDF is None:
            raise StateFileError(
                f"nothing to remember: layer {layer} has not completed a chunk of "
                f"{state.rule.chunk_size} tokens (flush writes an unfinished one)"
            )
        tensors[f"fast_weights.{layer}.state"] = state.state_BDF
    return tensors
