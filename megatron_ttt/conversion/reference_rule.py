"""The published fast-weight MLP, written down from its equations and from nothing else of ours.

What ``export style=reference`` writes is computed by another implementation. Verification runs
this transcription in its place, and tests hold the classes of ``megatron_ttt.hf`` against it. It
knows the published keys alone: normalisation, decay and clip do not exist here.

Shape suffixes: B batch rows, T tokens, C tokens of a chunk, D hidden, F ffn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ReferenceKeys:
    """The published keys of a ``config.json``, with the published values where one is absent."""

    layers: tuple[int, ...]
    eta: float
    chunk_size: int
    projects: bool
    reads_embeddings: bool


def reference_keys(config: Mapping[str, Any]) -> ReferenceKeys:
    """Read them from the content of a ``config.json``."""
    on = config.get("ttt_mode", True)
    return ReferenceKeys(
        layers=tuple(config.get("ttt_layers", range(0, 31, 6))) if on else (),
        eta=config.get("ttt_lr", 0.3),
        chunk_size=config.get("ttt_chunk", 8192),
        projects=config.get("ttt_proj", True),
        reads_embeddings=config.get("ttt_target", "hidden_states") == "input_embed",
    )


class ReferenceMLP(nn.Module):
    """A gated MLP whose down projection grows by ``eta V^T Z`` behind every chunk.

    ``Z = silu(X Wg^T) * (X Wu^T)`` are keys, ``V = conv(U) @ proj`` what is written under them.
    """

    def __init__(
        self,
        mlp: Any,
        *,
        kernel_D15: Tensor,
        projection_DD: Tensor | None,
        eta: float,
        chunk_size: int,
        source_BTD: Tensor | None = None,
    ) -> None:
        """Take what it computes from.

        Args:
            mlp: the plain MLP; its ``gate_proj``, ``up_proj`` and ``down_proj`` are used.
            kernel_D15: ``ttt_conv.weight``.
            projection_DD: ``ttt_proj.weight``, which multiplies from the right.
            eta, chunk_size: of the update.
            source_BTD: ``U``; ``None``: the MLP's own inputs.
        """
        super().__init__()
        self.mlp = mlp
        self.kernel_D15, self.projection_DD = kernel_D15, projection_DD
        self.eta, self.chunk_size = eta, chunk_size
        self.source_BTD = source_BTD

    def forward(self, inputs_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` to the same; every row starts from the trained down projection."""
        source_BTD = inputs_BTD if self.source_BTD is None else self.source_BTD
        rows = zip(inputs_BTD, source_BTD, strict=True)
        return torch.stack([self._row(inputs_TD, source_TD) for inputs_TD, source_TD in rows])

    def _row(self, inputs_TD: Tensor, source_TD: Tensor) -> Tensor:
        gate, up = self.mlp.gate_proj.weight, self.mlp.up_proj.weight
        fast_DF = self.mlp.down_proj.weight
        outputs = []
        for first in range(0, len(inputs_TD), self.chunk_size):
            inputs_CD = inputs_TD[first : first + self.chunk_size]
            keys_CF = F.silu(inputs_CD @ gate.T) * (inputs_CD @ up.T)
            outputs.append(keys_CF @ fast_DF.T)
            mixed_CD = self._convolved(source_TD[first : first + self.chunk_size])
            values_CD = mixed_CD if self.projection_DD is None else mixed_CD @ self.projection_DD
            fast_DF = fast_DF + self.eta * (values_CD.T @ keys_CF)
        return torch.cat(outputs)

    def _convolved(self, source_CD: Tensor) -> Tensor:
        """Two tokens back, two ahead, zeros beyond the chunk."""
        padded = F.pad(source_CD, (0, 0, 2, 2))
        taps = [self.kernel_D15[:, 0, tap] * padded[tap : tap + len(source_CD)] for tap in range(5)]
        return torch.stack(taps).sum(dim=0)
