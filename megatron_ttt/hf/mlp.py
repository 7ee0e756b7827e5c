"""The fast-weight MLP of the ``transformers`` classes, and what a call tells it about its rows.

Shape suffixes: B batch rows, T tokens, D hidden, F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.target import target_from_source
from megatron_ttt.fast_weights.update import fast_weight_scan
from megatron_ttt.fast_weights.write_rules import TokenInputs, Write, WriteCall, write
from megatron_ttt.hf.cache import FastWeightCache
from megatron_ttt.hf.configuration import update_rule
from megatron_ttt.inference.fast_weight_state import LayerTensors
from megatron_ttt.inference.token_runs import (
    TokenRuns,
    runs_of_mask,
    shift_back,
    shift_to_start,
    whole_runs,
)
from megatron_ttt.rule import (
    CONV,
    PROJ,
    ParameterSpec,
    TargetSource,
    UpdateRule,
    added_parameters,
    reads_hidden_apart,
    write_parameters,
)


@dataclass(frozen=True)
class CallLayout:
    """What one call's rows look like; every layer receives it as an argument.

    Either ``cache`` is set, or ``plan`` of the rows shifted by ``places_BT`` to start at 0.
    ``embeddings_BTD`` are the call's input embeddings.
    """

    runs: TokenRuns
    embeddings_BTD: Tensor
    cache: FastWeightCache | None = None
    plan: ChunkPlan | None = None
    places_BT: Tensor | None = None


class AddedWeight(nn.Module):
    """A parameter that the update rule adds; ``.weight``. ``start``: its value before training.

    For example ``ttt_proj.weight [D, D]``, which multiplies from the right, ``conv(U) @ weight``:
    no ``nn.Linear``, whose general initialisation is not for it.
    """

    def __init__(self, spec: ParameterSpec, hidden: int) -> None:
        super().__init__()
        self.start = spec.start
        self.weight = nn.Parameter(torch.zeros(spec.sizes(hidden)))


class FastWeightMLP(nn.Module):
    """``O = Z (W0 + eta S)^T`` with ``Z = act(X Wg^T) * (X Wu^T)``, ``W0`` the down projection."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.layer = layer
        self.config = config
        rule = update_rule(config)
        self.reads_embeddings = rule.target is TargetSource.input_embeddings
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.added = added_parameters(rule)
        for name, spec in self.added.items():
            self.add_module(name.removesuffix(".weight"), AddedWeight(spec, hidden))

    @property
    def rule(self) -> UpdateRule:
        """The update rule; read at every call, so that ``config`` may change between sequences."""
        return update_rule(self.config)

    def forward(self, inputs_BTD: Tensor, layout: CallLayout | None = None) -> Tensor:
        """``[B, T, D]`` to the same; ``layout`` None: without fast weights."""
        keys_BTF = self.act_fn(self.gate_proj(inputs_BTD)) * self.up_proj(inputs_BTD)
        if layout is None:
            return self.down_proj(keys_BTF)
        # Under autocast the keys decide the compute dtype.
        weight_DF = self.down_proj.weight.to(keys_BTF.dtype)
        source_BTD = layout.embeddings_BTD if self.reads_embeddings else inputs_BTD
        rule = self.rule
        hidden_BTD = inputs_BTD if reads_hidden_apart(rule) else None
        tokens = TokenInputs(keys_BTF, source_BTD, hidden_BTD)
        if layout.cache is not None:
            state = layout.cache.state_of(self.layer, batch=layout.runs.batch)
            return state.read(LayerTensors(tokens, weight_DF, self.make_write), layout.runs)
        assert layout.plan is not None
        tokens = tokens.map(lambda tensor: shift_to_start(tensor, layout.places_BT))
        output = fast_weight_scan(
            tokens.keys_BTF,
            self.make_write(tokens, layout.plan, rule),
            weight_DF,
            plan=layout.plan,
            eta=rule.eta,
        )
        return shift_back(output.outputs_BTD, layout.places_BT)

    def make_write(self, tokens: TokenInputs, plan: ChunkPlan, rule: UpdateRule) -> Write:
        """Return what tokens write under a rule whose parameters this layer has."""
        dtype = tokens.keys_BTF.dtype  # under autocast the keys decide the compute dtype
        targets_BTD = target_from_source(
            tokens.source_BTH,
            self._parameter(CONV),
            self._parameter(PROJ),
            plan=plan,
            conv=rule.conv,
            normalize=rule.normalize,
        )
        own = {name: self._parameter(name) for name in write_parameters(rule)}
        call = WriteCall(rule, plan, self.down_proj.weight.to(dtype), own)
        return write(tokens, targets_BTD.to(dtype), call)

    def _parameter(self, name: str) -> Tensor | None:
        if name not in self.added:
            return None
        return self.get_parameter(name)


def call_layout(
    embeddings_BTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: FastWeightCache | None,
    config: Any,
) -> CallLayout:
    """Return the layout of one call, shared by all layers.

    Args:
        embeddings_BTD: input embeddings of the call's tokens.
        attention_mask: ``[B, past + T]``, nonzero on real tokens; None: all are.
        position_ids: ``[B or 1, T]``; restarts mean documents where mask and cache are None.
        cache: what the rows have read before; None: the call holds whole rows.
        config: with the ``ttt_*`` keys.

    Raises:
        ValueError: a mask of another rank, or padding between a row's tokens.
    """
    batch, length, _ = embeddings_BTD.shape
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
        raise ValueError(
            "fast weights need to know each row's padding: pass a [batch, tokens] attention_mask"
        )
    if cache is not None:
        return CallLayout(
            cache.runs(attention_mask, batch=batch, length=length), embeddings_BTD, cache=cache
        )
    runs = whole_runs(batch, length) if attention_mask is None else runs_of_mask(attention_mask)
    rule = update_rule(config)
    plan = plan_chunks(
        _packed_starts(position_ids, batch) if attention_mask is None else None,
        batch=batch,
        length=length,
        chunk_size=rule.chunk_size,
        decay=rule.decay,
        padding_BT=None if runs.all_real else runs.padding(),
        device=embeddings_BTD.device,
    )
    places_BT = runs.places(embeddings_BTD.device)
    return CallLayout(runs, embeddings_BTD, plan=plan, places_BT=places_BT)


def _packed_starts(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Document starts ``[B, T]`` where positions do not follow each other; None: one document."""
    if position_ids is None:
        return None
    starts_BT = torch.nn.functional.pad(position_ids.cpu().diff(dim=1) != 1, (1, 0))
    return starts_BT.expand(batch, -1) if bool(starts_BT.any()) else None
