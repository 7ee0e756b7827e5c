"""The model of the real Transformer Engine, built without a GPU: what checkpoints see of it.

Its kernels need a device; its modules, their parameters and their state do not. CONTRIBUTING.md
says how to install it on a machine without one.
"""

import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_ttt.config.schema import AttentionBackend, Config, OptimizerForm, Precision
from megatron_ttt.config.to_megatron import HAVE_TE, transformer_config
from megatron_ttt.model.build import build_model
from megatron_ttt.model.initialize import Origin, global_parameters, initialize
from megatron_ttt.model.shards import sharded_dim
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import checkpoint
from megatron_ttt.training.distributed import Ranks, model_parallel
from tests.distributed.training_runs import live_draw, tiny_config
from tests.pool import RankPool

pytestmark = pytest.mark.skipif(
    not HAVE_TE, reason="Transformer Engine is not installed (CONTRIBUTING.md: without a GPU)"
)

LAYOUTS = [{}, {"tp": 2}, {"pp": 2}]
CONTENT = checkpoint.content(OptimizerForm.fully_reshardable)


@dataclass(frozen=True)
class Stored:
    """One tensor of a rank as a checkpoint stores it."""

    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    dtype: torch.dtype
    value: Tensor


def build(config: Config, here: Ranks, backend: AttentionBackend) -> Any:
    """A stage as a new run begins; Transformer Engine only asks whether there is a GPU."""
    config = replace(config, model=replace(config.model, attention=backend))
    fused = backend is AttentionBackend.transformer_engine
    with mock.patch.object(torch.cuda, "is_available", lambda: fused):
        transformer = transformer_config(config, device_is_cuda=fused)
        assert (transformer.transformer_impl == "transformer_engine") is fused
        return build_model(config, transformer, here.groups, Origin.DRAWN)


def stored(model: Any) -> dict[str, Stored]:
    """By checkpoint name and place, what this rank stores."""
    state = model.sharded_state_dict(metadata=CONTENT)
    apply_factories(state)  # gate and up of one tensor
    found = {}
    for part in nested_values(state):
        assert isinstance(part, ShardedTensor), part
        found[f"{part.key} {part.global_offset}"] = Stored(
            tuple(part.local_shape),
            tuple(part.global_shape),
            tuple(part.global_offset),
            part.dtype,
            part.data.detach().clone(),
        )
    return found


def compare(rank: int, ranks: int, config: Config, folder: Path) -> dict[str, Any]:
    """Both backends' models: as they start, and each with what the other has saved."""
    torch_backend, engine = AttentionBackend.torch, AttentionBackend.transformer_engine
    # A rank of the pool is a daemon, which may not start the process that Megatron's save does.
    own: Any = multiprocessing.current_process()
    daemon = mock.patch.dict(own._config, daemon=False)
    with daemon, megatron_on_cpu(), model_parallel(config) as here:
        plain, fused = (build(config, here, backend) for backend in (torch_backend, engine))
        told: dict[str, Any] = {
            "modules": {type(module).__name__ for module in fused.modules()},
            "start": [stored(model) for model in (plain, fused)],
            "split": [
                sorted((tuple(p.shape), sharded_dim(p)) for _, p in global_parameters(model))
                for model in (plain, fused)
            ],
            "extra": sum(name.endswith("_extra_state") for name in fused.state_dict()),
        }
        tp = here.groups.tp
        for name, model, other in (("plain", plain, fused), ("fused", fused, plain)):
            initialize(
                model,
                seed=len(name) + 7 * (name == "fused"),
                vocab_size=config.model.vocab_size,
                tp_rank=tp.rank(),
                tp_size=tp.size(),
                draw=live_draw,
            )
            written = stored(model)
            target = folder / name
            if rank == 0:
                target.mkdir()
            torch.distributed.barrier()
            dist_checkpointing.save(model.sharded_state_dict(metadata=CONTENT), target)
            state = dist_checkpointing.load(other.sharded_state_dict(metadata=CONTENT), target)
            missing = other.load_state_dict(state, strict=False)
            assert all(key.endswith("_extra_state") for key in missing.missing_keys)
            assert not missing.unexpected_keys
            told[name] = [written, stored(other)]
        return told


def differing(one: dict[str, Stored], other: dict[str, Stored]) -> list[str]:
    """Names that either lacks, or whose tensors differ in anything."""
    wrong = sorted(set(one) ^ set(other))
    for name in sorted(set(one) & set(other)):
        a, b = one[name], other[name]
        places = [(x.shape, x.global_shape, x.offset, x.dtype) for x in (a, b)]
        if places[0] != places[1] or not torch.equal(a.value, b.value):
            wrong.append(f"{name}: {places}, {a.value.flatten()[:2]} {b.value.flatten()[:2]}")
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_its_model_is_the_torch_backends(
    pool: RankPool, tmp_path: Path, layout: dict[str, int]
) -> None:
    config = tiny_config(**layout)
    config = replace(config, train=replace(config.train, precision=Precision.fp32))
    for told in pool.run(compare, config, tmp_path, ranks=max([1, *layout.values()])):
        assert {"TELayerNormColumnParallelLinear", "TEDotProductAttention"} <= told["modules"]
        assert "FastWeightMLP" in told["modules"] and told["extra"] > 5
        assert differing(*told["start"]) == []  # names, shapes, places, values of a new model
        assert told["split"][0] == told["split"][1]
        for direction in ("plain", "fused"):
            assert differing(*told[direction]) == []
            assert all(part.value.abs().sum() > 0 for part in told[direction][1].values())
