"""Reading with a ``transformers`` model, row by row as ``inference/generation.py`` asks for it.

Shape suffixes: B batch rows, T tokens of a call, P tokens of all calls, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_ttt.hf.cache import FastWeightCache

PREFILL_TOKENS = 2048


class TransformersReader:
    """Rows of different lengths in one cache: each call pads on the left, behind the mask.

    ``places`` counts each row's real tokens, which is also where its positions stand.
    """

    def __init__(self, model: Any, *, batch: int, cache: FastWeightCache | None = None) -> None:
        """Take what it computes from.

        Args:
            model: in ``eval`` mode; with or without fast weights.
            batch: rows.
            cache: with a memory, or None for a fresh one.
        """
        self.model = model
        self.places = [0] * batch
        self.mask_BP = torch.zeros(batch, 0, dtype=torch.long)
        self.cache: Any = cache
        if cache is None and getattr(model.config, "ttt_mode", False):
            self.cache = FastWeightCache(model.config)
        elif cache is None:
            self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def read_last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``[B, V]`` after each row's last new token; rows without any mean nothing."""
        longest = max(len(row) for row in rows)
        tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        real_BT = torch.zeros_like(tokens_BT)
        for row, ids in enumerate(rows):
            if len(ids):
                tokens_BT[row, longest - len(ids) :] = torch.as_tensor(ids)
                real_BT[row, longest - len(ids) :] = 1
        logits_BV: Tensor | None = None
        for first in range(0, longest, PREFILL_TOKENS):
            some = slice(first, first + PREFILL_TOKENS)
            logits_BV = self._call(tokens_BT[:, some], real_BT[:, some])
        assert logits_BV is not None, "there is nothing to read"
        return logits_BV

    def _call(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        device = self.model.device
        places_B1 = torch.tensor(self.places)[:, None]
        positions_BT = (places_B1 + real_BT.cumsum(dim=1) - 1).clamp(min=0)
        self.mask_BP = torch.cat([self.mask_BP, real_BT], dim=1)
        mask_BP = None if bool(self.mask_BP.all()) else self.mask_BP.to(device)
        output = self.model(
            tokens_BT.to(device),
            attention_mask=mask_BP,
            position_ids=positions_BT.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.places = [
            place + count
            for place, count in zip(self.places, real_BT.sum(dim=1).tolist(), strict=True)
        ]
        return output.logits[:, -1]
