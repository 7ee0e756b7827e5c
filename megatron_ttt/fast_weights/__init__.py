"""Fast weights in pure torch: tensors in, tensors out; no Megatron, no Hydra, no process group."""

from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.scale import Clip, ClipMode, Normalize
from megatron_ttt.fast_weights.sweeps import CarryExchange, Direction, PendingCarries
from megatron_ttt.fast_weights.target import target_from_source
from megatron_ttt.fast_weights.update import (
    FastWeightOutput,
    fast_weight_linear,
    fast_weight_spans,
    flush,
)

__all__ = [
    "CarryExchange",
    "ChunkPlan",
    "Clip",
    "ClipMode",
    "Direction",
    "FastWeightOutput",
    "Normalize",
    "PendingCarries",
    "fast_weight_linear",
    "fast_weight_spans",
    "flush",
    "plan_chunks",
    "target_from_source",
]
