"""RMSNorm for the ``torch`` backend: Megatron's local wrapper refuses sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """``x / rms(x) * weight`` over the last dimension; ``weight [hidden_size]``, replicated.

    The weight carries the mark by which Megatron sums its gradient over tensor-parallel ranks when
    each of them saw only a part of the sequence.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
