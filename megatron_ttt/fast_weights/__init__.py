"""Fast weights in pure torch: tensors in, tensors out; no Megatron, no Hydra, no process group."""

from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.exchange import CarryExchange, Direction, PendingCarries
from megatron_ttt.fast_weights.target import target_from_source
from megatron_ttt.fast_weights.update import (
    FastWeightOutput,
    fast_weight_linear,
    fast_weight_scan,
    written_state,
)
from megatron_ttt.fast_weights.write_rules import TokenInputs, Write, WriteCall, write

__all__ = [
    "CarryExchange",
    "ChunkPlan",
    "Direction",
    "FastWeightOutput",
    "PendingCarries",
    "TokenInputs",
    "Write",
    "WriteCall",
    "fast_weight_linear",
    "fast_weight_scan",
    "plan_chunks",
    "target_from_source",
    "write",
    "written_state",
]
