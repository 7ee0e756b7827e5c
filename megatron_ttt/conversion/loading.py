"""Starting a run straight from safetensors: each rank reads the rows and columns of its slice."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.config.schema import Config
from megatron_ttt.conversion.agreement import rule_notices
from megatron_ttt.conversion.hf_config import CHOICES, check_agreement, model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.source import MegatronView
from megatron_ttt.conversion.ttt_config import has_rule, target_generator, ttt_from_hf
from megatron_ttt.model.initialize import global_parameters, sharded_dim

# Checkpoints name these norms as if they were fused into the linear layer behind them.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@torch.no_grad()
def load_hf_weights(
    folder: Path,
    model: torch.nn.Module,
    config: Config,
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
        config: the run; its model must be the checkpoint's.
        tp_rank, tp_size: this rank's slice.
        given: dotted keys that the user gave; ``None``: another update rule is read on purpose.
        report: told of differences that the user chose.

    Returns:
        Names, as distributed checkpoints have them, of the parameters that were initialised.

    Raises:
        ConfigError: the folder is damaged, or is another model; see
            :func:`hf_config.check_agreement`.
    """
    target = target_generator(config.ttt, layers=config.model.layers)
    source = HFFolder(folder)
    checkpoint = model_from_hf(source.config, name=config.model.name, where=str(folder))
    notices = check_agreement(
        config.model, checkpoint, str(folder), chosen=set(given or ()) & set(CHOICES)
    )
    layers = config.model.layers
    trained = None
    if has_rule(source.config) or target.layers:
        trained = ttt_from_hf(
            source.config,
            layers=layers,
            where=str(folder),
            tensors=source.tensors,
            **_said(source, config, given),
        )
    if trained is not None and given is not None:
        notices += rule_notices(config.ttt, trained, layers=layers, given=given, where=str(folder))
    for notice in notices:
        report(notice)
    view = MegatronView(source, target=target, seed=config.train.seed)
    for name, parameter in global_parameters(model):
        key = checkpoint_key(name)
        axis = sharded_dim(parameter)
        parameter.copy_(_slice(view, key, parameter, axis, tp_rank, tp_size))
    return sorted(view.drawn)


def _said(source: HFFolder, config: Config, given: Collection[str] | None) -> dict[str, Any]:
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


def _slice(
    view: MegatronView, key: str, local: Tensor, axis: int | None, tp_rank: int, tp_size: int
) -> Tensor:
    """Return this rank's part of a whole tensor, in the shape of ``local``."""
    tensor = view.tensor(key)
    if axis is None:
        return view.rows(tensor, 0, tensor.shape[0])
    if axis == 1:
        width = local.shape[1]
        return view.rows(tensor, 0, tensor.shape[0], (tp_rank * width, (tp_rank + 1) * width))
    assert axis == 0, f"{key} is split along dim {axis}"
    if key.endswith("linear_fc1.weight"):  # each rank holds its rows of gate, then of up
        half = local.shape[0] // 2
        up = tensor.shape[0] // 2
        starts = [tp_rank * half, up + tp_rank * half]
        return torch.cat([view.rows(tensor, start, start + half) for start in starts])
    count = local.shape[0]
    start = tp_rank * count
    stop = min(start + count, tensor.shape[0])
    if start < stop == start + count:
        return view.rows(tensor, start, stop)
    padded = torch.zeros(local.shape, dtype=view.dtype(tensor))  # rows that pad the vocabulary
    if start < stop:
        padded[: stop - start] = view.rows(tensor, start, stop)
    return padded
