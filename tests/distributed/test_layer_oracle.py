"""A Megatron layer beside the equations: its settings reach what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import Config, TTTMode
from megatron_ttt.fast_weights.reference import reference_fast_weight, reference_target
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import CONV, Conv, Normalize, UpdateRule
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.step import ForwardStep
from tests.distributed.training_runs import (
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    tiny_config,
)
from tests.pool import RankPool

RULES: dict[str, dict[str, Any]] = {
    "published": {},
    "next_token": {"conv": Conv.next_token},
    "causal": {"conv": Conv.causal},
    "off": {"conv": Conv.off},
    "kernel 9": {"kernel_size": 9},
    "spectral": {"normalize": Normalize.spectral, "eta": 0.1},
    "key_energy": {"normalize": Normalize.key_energy, "eta": 0.05},
}
ETA_FACTOR = 0.75


def layer_and_oracle(rank: int, ranks: int, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """The first fast layer's output ``[B, T, H]``, the oracle's, and what W0 alone gives."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        mlp = trainer.stage.decoder.layers[0].mlp
        seen: list[tuple[Tensor, Tensor]] = []
        mlp.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(
                (kwargs.get("hidden_states", args[0] if args else None), output[0])
            ),
            with_kwargs=True,
        )
        batch = next(micro_batches_of(global_batch(config, 0, packed=True), config, here))
        step = ForwardStep(
            config, here, scan=trainer.scan, mode=TTTMode.in_place, eta_factor=ETA_FACTOR
        )
        with torch.no_grad():
            step(iter([batch]), trainer.model)
        inputs, output = (tensor.transpose(0, 1).double() for tensor in seen[0])
        rule = replace(config.ttt, eta=ETA_FACTOR * config.ttt.eta)
        starts, padding = batch.document_starts_BT, batch.padding_BT
        return output, *oracle(mlp, rule, inputs, starts, padding)


def oracle(
    mlp: FastWeightMLP, rule: UpdateRule, inputs: Tensor, starts: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations in fp64 on the layer's input ``[B, T, H]``, with fast weights and without."""
    weights = {name: weight.detach().double() for name, weight in mlp.named_parameters()}
    gate, up = (inputs @ weights["linear_fc1.weight"].T).chunk(2, dim=-1)
    keys, slow = torch.nn.functional.silu(gate) * up, weights["linear_fc2.weight"]
    layout = {
        "chunk_size": rule.chunk_size,
        "document_starts": starts,
        "padding": padding,
        "normalize": rule.normalize,
    }
    targets = reference_target(
        inputs, weights.get(CONV), weights["ttt_proj.weight"], conv=rule.conv, **layout
    )
    output, _ = reference_fast_weight(keys, targets, slow, eta=rule.eta, **layout)
    return output, keys @ slow.T


@pytest.mark.parametrize("changes", RULES.values(), ids=RULES)
def test_a_layer_computes_what_the_equations_say(pool: RankPool, changes: dict[str, Any]) -> None:
    config = tiny_config()
    config = replace(config, ttt=replace(config.ttt, **changes))
    ((found, expected, plain),) = pool.run(layer_and_oracle, config, ranks=1, timeout=100)
    written = (expected - plain).norm()
    assert written > 0.02 * plain.norm(), "fast weights not alive"
    assert (found - expected).norm() < 1e-4 * written
