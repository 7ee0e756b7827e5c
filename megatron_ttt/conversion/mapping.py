"""The whole mapping of a model: every tensor of both sides, from the family's table."""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_ttt.config.schema import ModelConfig
from megatron_ttt.conversion.families import FAMILIES
from megatron_ttt.conversion.families import decoder as names
from megatron_ttt.conversion.families.decoder import Bias
from megatron_ttt.conversion.rules import Copy, Rule, Run, TensorMap, shape_of, sizes_of
from megatron_ttt.rule import ParameterSpec


@dataclass(frozen=True)
class TargetGenerator:
    """Which layers have fast weights, and the parameters that these add to a layer.

    Attributes:
        layers: from 0; empty for a model without fast weights.
        parameters: by name inside the MLP, the same on both sides; nothing is transposed.
    """

    layers: tuple[int, ...]
    parameters: typing.Mapping[str, ParameterSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Mapping:
    """A model's tensors on both sides.

    Attributes:
        tensors: in the order of the forward pass.
        zeros: Hugging Face tensors that must be zero, with their shapes.
    """

    tensors: tuple[TensorMap, ...]
    zeros: dict[str, tuple[int, ...]]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor that Megatron has a place for."""
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in self.tensors:
            for name in tensor.sources:
                rows = sum(run.count for run in tensor.runs if run.tensor == name)
                shapes[name] = (rows, *tensor.shape[1:])
        return shapes

    def megatron_runs(self) -> dict[str, list[tuple[str, Run]]]:
        """Return the other direction.

        Returns:
            For each Hugging Face tensor, in the order of its rows, where they are in Megatron's:
            ``(key, Run(hf name, ...))`` with the rows counted in the *Megatron* tensor.
        """
        placed: dict[str, list[tuple[int, str, Run]]] = {}
        for tensor in self.tensors:
            row = 0
            for run in tensor.runs:
                place = (run.start, tensor.megatron, Run(run.tensor, row, run.count))
                placed.setdefault(run.tensor, []).append(place)
                row += run.count
        return {
            name: [(key, run) for _, key, run in sorted(places, key=lambda place: place[0])]
            for name, places in placed.items()
        }


def build_mapping(model: ModelConfig, target: TargetGenerator) -> Mapping:
    """Return the mapping of a model with fast weights in ``target.layers``."""
    table, sizes = FAMILIES[model.family], sizes_of(model)
    layer_rules: list[Rule] = list(names.LAYER)
    zeros: dict[str, tuple[int, ...]] = {}
    if table.query_key_norms:
        layer_rules += names.QUERY_KEY_NORMS
    if model.attention_bias:
        layer_rules += names.ATTENTION_BIAS
    fast_rules: list[Rule] = [
        Copy(f"mlp.{name}", f"mlp.{name}", spec.shape) for name, spec in target.parameters.items()
    ]
    tensors = [_expand(names.EMBEDDING, sizes)]
    for layer in range(model.layers):
        rules: Sequence[Rule] = layer_rules + (fast_rules if layer in target.layers else [])
        tensors += [_expand(rule, sizes, layer) for rule in rules]
        if model.attention_bias and table.bias is Bias.CONFIGURED:
            zero = names.OUTPUT_BIAS
            zeros[f"model.layers.{layer}.{zero.hf}"] = shape_of(zero.shape, sizes)
    tensors.append(_expand(names.FINAL_NORM, sizes))
    if not model.tied_embeddings:
        tensors.append(_expand(names.OUTPUT, sizes))
    return Mapping(tuple(tensors), zeros)


def _expand(rule: Rule, sizes: dict[str, int], layer: int | None = None) -> TensorMap:
    shape, runs = rule.expand(sizes)
    if layer is None:
        return TensorMap(rule.megatron, shape, runs)
    prefix = f"model.layers.{layer}."
    moved = tuple(Run(prefix + run.tensor, run.start, run.count) for run in runs)
    return TensorMap(f"decoder.layers.{layer}.{rule.megatron}", shape, moved)
