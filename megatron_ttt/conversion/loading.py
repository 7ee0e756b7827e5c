"""Starting a run straight from safetensors: each rank reads the rows and columns of its slice."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.config.schema import HF_SCHEME, ComputeConfig, Config
from megatron_ttt.conversion.agreement import rule_notices
from megatron_ttt.conversion.hf_config import CHOICES, check_agreement, model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.manifest import check_start
from megatron_ttt.conversion.source import MegatronView
from megatron_ttt.conversion.ttt_config import has_rule, target_generator, ttt_from_hf
from megatron_ttt.model.initialize import global_parameters
from megatron_ttt.model.shards import Shard, shard_of

# Checkpoints name these norms as if they were fused into the linear layer behind them.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@torch.no_grad()
def load_hf_weights(
    folder: Path,
    model: torch.nn.Module,
    config: ComputeConfig,
    *,
    tp_rank: int,
    tp_size: int,
    given: Collection[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Fill this rank's parameters from a Hugging Face folder.

    What a plain checkpoint lacks of the target generator starts as an import would start it,
    from ``train.seed``.

    Args:
        folder: with ``config.json`` and safetensors.
        model: this rank's pipeline stage.
        config: what is computed; its model must be the checkpoint's.
        tp_rank, tp_size: this rank's slice.
        given: dotted keys that the user gave; ``None``: another update rule is read on purpose.
        report: told of differences that the user chose.

    Returns:
        Names, as distributed checkpoints have them, of the parameters that were initialised.

    Raises:
        ConfigError: the folder is damaged, or is another model; see
            :func:`hf_config.check_agreement`.
    """
    source = HFFolder(folder)
    for notice in differing(source, config, given=given):
        report(notice)
    target = target_generator(config.ttt, layers=config.model.layers)
    view = MegatronView(source, target=target, seed=config.train.seed)
    for name, parameter in global_parameters(model):
        key = checkpoint_key(name)
        shard = shard_of(name, parameter, tp_rank=tp_rank, tp_size=tp_size)
        parameter.copy_(_read(view, key, parameter, shard))
    return sorted(view.drawn)


def differing(
    source: HFFolder, config: ComputeConfig, *, given: Collection[str] | None
) -> list[str]:
    """Return a line for each difference that the user chose between a run and where it starts.

    Arguments as for :func:`load_hf_weights`.

    Raises:
        ConfigError: a difference that nobody chose.
    """
    where, layers = str(source.path), config.model.layers
    checkpoint = model_from_hf(source.config, name=config.model.name, where=where)
    chosen = set(given or ()) & set(CHOICES)
    notices = check_agreement(config.model, checkpoint, where, chosen=chosen)
    trained = None
    if has_rule(source.config) or target_generator(config.ttt, layers=layers).layers:
        trained = ttt_from_hf(
            source.config,
            layers=layers,
            where=where,
            tensors=source.tensors,
            **_said(source, config, given),
        )
    if trained is not None and given is not None:
        notices += rule_notices(config.ttt, trained, layers=layers, given=given, where=where)
    return notices


def start_notices(config: Config, given: Collection[str]) -> list[str]:
    """Return what a run would say of where its weights come from; nothing is loaded.

    Raises:
        ConfigError: it would refuse to start from there.
    """
    place = config.checkpoint.load
    if place is None:
        return []
    if place.startswith(HF_SCHEME):
        return differing(HFFolder(Path(place.removeprefix(HF_SCHEME))), config, given=given)
    folder = MegatronFolder(Path(place))
    return check_start(folder.facts, config, folder.path, given=given)


def _said(source: HFFolder, config: ComputeConfig, given: Collection[str] | None) -> dict[str, Any]:
    """Chunk and eta that the user gave, for fast weights that their file leaves undescribed."""
    if has_rule(source.config):
        return {}
    values = {"chunk_size": config.ttt.chunk_size, "eta": config.ttt.eta}
    return {
        name: value for name, value in values.items() if given is None or f"ttt.{name}" in given
    }


def checkpoint_key(name: str) -> str:
    """Return the name a parameter has in a distributed checkpoint."""
    for suffix, fused in _NORMS.items():
        if name.endswith("." + suffix):
            return name.removesuffix(suffix) + fused
    return name


def _read(view: MegatronView, key: str, local: Tensor, shard: Shard) -> Tensor:
    """Return a rank's part of a whole tensor, of which no more than that is read."""
    tensor = view.tensor(key)
    rows = tensor.shape[0]
    if shard.axis is None:
        return view.rows(tensor, 0, rows)
    if shard.axis == 1:
        (columns,) = shard.ranges
        return view.rows(tensor, 0, rows, columns)
    assert shard.axis == 0, f"{key} is split along dim {shard.axis}"
    # What lies beyond the checkpoint's rows pads the vocabulary.
    there = [(min(start, rows), min(end, rows)) for start, end in shard.ranges]
    parts = [view.rows(tensor, start, end) for start, end in there if start < end]
    padding = len(local) - sum(len(part) for part in parts)
    if padding:
        parts.append(torch.zeros(padding, *local.shape[1:], dtype=view.dtype(tensor)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
