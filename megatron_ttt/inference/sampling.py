"""Choosing the next token: greedy, temperature, top-k, top-p, from a seed.

Sampling happens on the CPU with a generator of its own: tensor-parallel ranks, which hold equal
logits, choose equal tokens, and a saved generator goes on where it stopped.

Shape suffixes: B batch rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    ``temperature`` 0 takes the most likely token. ``top_k`` keeps the k most likely tokens,
    ``top_p`` the fewest whose probabilities add up to at least p; None: no limit.

    Raises:
        ValueError: a value that means nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature} is below 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k} is below 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is not in (0, 1]")


class Sampler:
    """Draws one token per row; the generator's state is part of a session."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)

    def choose(self, logits_BV: Tensor) -> list[int]:
        """One token id per row."""
        if self.settings.temperature == 0:
            return logits_BV.argmax(dim=-1).tolist()
        probabilities_BV = self.probabilities(logits_BV)
        return torch.multinomial(probabilities_BV, 1, generator=self.generator)[:, 0].tolist()

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Return what ``choose`` draws from: ``[B, V]`` float32, CPU, 0 outside top-k and top-p."""
        scaled_BV = logits_BV.detach().float().cpu() / self.settings.temperature
        if self.settings.top_k is not None:
            k = min(self.settings.top_k, scaled_BV.shape[-1])
            least_B1 = scaled_BV.topk(k, dim=-1).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, float("-inf"))
        probabilities_BV = scaled_BV.softmax(dim=-1)
        if self.settings.top_p is not None:
            sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
            before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
            kept_BV = sorted_BV.masked_fill(before_BV >= self.settings.top_p, 0.0)
            probabilities_BV = torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV)
        return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
