"""A context turned into parameters: ``W0 + eta * S`` written as a plain checkpoint.

What a model has read is the state of its fast weights. Folded into the down projections it makes a
checkpoint of the plain architecture, which every engine serves: the baked model answers at
position 0 as the model with that state does while it writes nothing more.

Shape suffixes: T tokens, V vocabulary, D hidden, F ffn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, row_blocks
from megatron_ttt.checkpoints.work_folder import WorkFolder, writing
from megatron_ttt.conversion.exporting import Piece, shards_of, weights_index, write_shard
from megatron_ttt.conversion.hf_config import without_fast_weights
from megatron_ttt.conversion.hf_folder import CONFIG, INDEX, HFFolder, companions
from megatron_ttt.hf.cache import FastWeightCache
from megatron_ttt.hf.sessions import flush
from megatron_ttt.inference.fast_weight_state import FastWeightState
from megatron_ttt.inference.transformers_backend import TransformersBackend

REPORT_FILE = "bake.json"
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Distance:
    """How far two models' logits on the same text lie apart.

    ``largest``: largest absolute difference over max(1, largest absolute logit). ``divergence``:
    mean over tokens of KL(first || second), nats.
    """

    largest: float
    divergence: float


@dataclass(frozen=True)
class BakeReport:
    """What was baked, and how the result compares on the probe text.

    Attributes:
        tokens_read: of the text, those of a memory not counted.
        update_ratios: ``norm(eta * S) / norm(W0)`` by layer, as a string.
        probe_tokens: of the probe text, read from position 0.
        frozen: baked against the model with that state, writing nothing more: rounding.
        live: baked against the model with that state, writing on.
        losses: nats a token on the probe of the model without fast weights, with the state and
            writing on, and baked; ``None`` for a probe of one token.
    """

    tokens_read: int
    update_ratios: dict[str, float]
    probe_tokens: int
    frozen: Distance
    live: Distance
    losses: dict[str, float | None]


def read_text(
    backend: TransformersBackend, tokens: Sequence[int], *, memory: Path | None = None
) -> dict[int, FastWeightState]:
    """Read a text behind a memory, if there is one, and flush the unfinished chunk.

    Args:
        backend: with its fast weights on.
        tokens: may be empty behind a memory.
        memory: a file of one row.

    Returns:
        The state of every fast layer (index from 0), of one row.

    Raises:
        StateFileError: the memory is damaged, or of another model.
        ValueError: there is nothing to read.
    """
    if memory is None and not tokens:
        raise ValueError("the text is empty")
    reader = backend.new_reader(1) if memory is None else backend.load_memory(memory, 1)
    if tokens:
        reader.read_last([tokens])
    flush(backend.model, reader.cache)
    states: dict[int, FastWeightState] = reader.cache.fast_weights
    return states


@torch.no_grad()
def probe_logits(
    model: Any, states: Mapping[int, FastWeightState], tokens: Sequence[int], *, chunk_size: int
) -> Tensor:
    """Logits ``[T, V]`` (fp32, CPU) of a fresh context that starts with those states.

    Args:
        model: of ours, with fast weights on.
        states: of one row; not changed.
        tokens: the context, from position 0.
        chunk_size: of what is read now; more than ``len(tokens)`` writes nothing.
    """
    cache = FastWeightCache(model.config)
    cache.rule = replace(cache.rule, chunk_size=chunk_size)
    for layer, state in states.items():
        fresh = FastWeightState(cache.rule, batch=1)
        matrix_1DF = None if state.state_BDF is None else state.state_BDF.clone()
        fresh.restore(places=[0], pending=[0], state_BDF=matrix_1DF, unfinished=None)
        cache.fast_weights[layer] = fresh
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits[0]
    return logits.float().cpu()


@torch.no_grad()
def plain_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits ``[T, V]`` (fp32, CPU) of a model that has no fast weights, or has them off."""
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits.float().cpu()


def distance(one_TV: Tensor, other_TV: Tensor) -> Distance:
    """See :class:`Distance`."""
    one, other = one_TV.double(), other_TV.double()
    largest = (one - other).abs().max() / one.abs().max().clamp(min=1)
    log_one, log_other = one.log_softmax(-1), other.log_softmax(-1)
    divergence = (log_one.exp() * (log_one - log_other)).sum(-1).mean()
    return Distance(float(largest), float(divergence))


def loss(logits_TV: Tensor, tokens: Sequence[int]) -> float | None:
    """Nats a token of predicting each token but the first; ``None`` where there is none."""
    if len(tokens) < 2:
        return None
    return float(torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(tokens[1:])))


@torch.no_grad()
def bake(
    backend: TransformersBackend,
    source: Path,
    destination: Path,
    tokens: Sequence[int],
    probe: Sequence[int],
    *,
    memory: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> BakeReport:
    """Read, fold, write, and compare; the destination appears when all of it is done.

    Args:
        backend: the model of ``source`` with its fast weights on.
        source: its Hugging Face folder.
        destination: folder; must not exist.
        tokens: the text.
        probe: what the models are compared on.
        memory: a file to start from.
        shard_bytes: largest file of weights.

    Raises:
        ConfigError: the source is damaged or of no plain architecture, or the destination cannot be
            written.
        ValueError: see :func:`read_text`; or a state is not finite.
    """
    opened = HFFolder(source)
    config = plain_config(opened.config)  # refused, if at all, before a long text is read
    states = read_text(backend, tokens, memory=memory)
    model = backend.model
    rule = next(iter(states.values())).rule
    layers = model.get_decoder().layers
    ratios = {
        str(layer): float(state.update_ratios(layers[layer].mlp.down_proj.weight)[0])
        for layer, state in states.items()
    }
    diverged = [layer for layer, ratio in ratios.items() if not math.isfinite(ratio)]
    if diverged:
        raise ValueError(
            f"layers {', '.join(diverged)}: the state is not finite after {len(tokens)} tokens: "
            "nothing to fold; lower ttt.eta, or set ttt.clip or ttt.decay"
        )
    frozen = probe_logits(model, states, probe, chunk_size=len(probe) + 1)
    live = probe_logits(model, states, probe, chunk_size=rule.chunk_size)
    model.config.ttt_mode = False
    off = plain_logits(model, probe)
    model.config.ttt_mode = True
    found: list[BakeReport] = []

    def compare(folder: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        baked = plain_logits(plain.to(backend.device).eval(), probe)
        report = BakeReport(
            tokens_read=len(tokens),
            update_ratios=ratios,
            probe_tokens=len(probe),
            frozen=distance(frozen, baked),
            live=distance(live, baked),
            losses={
                "without": loss(off, probe),
                "live": loss(live, probe),
                "baked": loss(baked, probe),
            },
        )
        (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n")
        found.append(report)

    matrices = {
        layer: state.state_BDF[0].cpu()
        for layer, state in states.items()
        if state.state_BDF is not None
    }
    write_plain(
        opened,
        destination,
        matrices,
        config=config,
        eta=rule.eta,
        shard_bytes=shard_bytes,
        check=compare,
    )
    return found[0]


def write_plain(
    source: HFFolder,
    destination: Path,
    matrices: Mapping[int, Tensor],
    *,
    config: Mapping[str, Any],
    eta: float,
    shard_bytes: int,
    check: Callable[[Path], None],
) -> None:
    """Write the plain architecture's checkpoint with ``W0 + eta * S`` as its down projections.

    Args:
        source: of a model with fast weights.
        destination: folder; must not exist.
        matrices: ``S [D, F]`` by layer.
        config: content of the new ``config.json``.
        eta: of the update rule.
        shard_bytes: largest file of weights.
        check: called with the finished folder before it becomes visible.

    Raises:
        ConfigError: the source is damaged, or the destination cannot be written.
    """
    read = {f"model.layers.{layer}.mlp.down_proj.weight": s for layer, s in matrices.items()}
    pieces = [
        Piece(name, stored.shape, stored.dtype, ())
        for name, stored in source.tensors.items()
        if ".ttt_" not in name
    ]
    shards = shards_of(pieces, shard_bytes)
    job = {
        "source": str(source.path.resolve()),
        "eta": eta,
        "states": {name: float(matrix.double().sum()) for name, matrix in read.items()},
    }
    with writing(destination):
        folder = WorkFolder(destination, job)
        for file, some in shards.items():
            if file not in folder.done:
                with (folder.path / file).open("wb") as stream:
                    blocks = partial(_rows, source, read, eta)
                    write_shard(stream, some, blocks, _silent)
                folder.finish(file)
        if len(shards) > 1:
            folder.write_text(INDEX, weights_index(shards))
        folder.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
        for file in companions(source.path):
            folder.copy(source.path / file, file)
        check(folder.path)
        folder.publish()


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the same architecture without fast weights."""
    kept = {key: value for key, value in config.items() if not key.startswith("ttt_")}
    return without_fast_weights(kept)


def _rows(
    source: HFFolder, read: Mapping[str, Tensor], eta: float, piece: Piece
) -> Iterator[Tensor]:
    """Yield a tensor's rows in order; the sum is rounded once, to the tensor's dtype."""
    matrix_DF = read.get(piece.name)
    for start, stop in row_blocks(piece.shape, piece.dtype, BLOCK_BYTES):
        rows = source.rows(piece.name, start, stop)
        if matrix_DF is not None:
            read_rows = matrix_DF[start:stop].double()
            rows = torch.add(rows.double(), read_rows, alpha=eta).to(piece.dtype)
        yield rows


def _silent(name: str, size: int) -> None:
    """Nobody watches single tensors here."""
