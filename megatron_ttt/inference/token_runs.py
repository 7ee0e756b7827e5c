"""Which tokens of a call are real: one run per row, padding before and after it.

A token's place is the number of real tokens before it in its row since the session began, so
padding takes no place: rows are shifted to start at their first real token before the chunk grid
is laid over them, and their outputs shifted back.

Shape suffixes: B batch rows, T tokens of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRuns:
    """Row ``b``'s real tokens are ``first[b] <= t < first[b] + count[b]``. Python integers.

    Hidden states, keys and target sources of all layers share one record per call.
    """

    first: tuple[int, ...]
    count: tuple[int, ...]
    length: int

    @property
    def batch(self) -> int:
        return len(self.first)

    @property
    def all_real(self) -> bool:
        """Whether no row has padding."""
        return all(count == self.length for count in self.count)

    def padding(self) -> Tensor:
        """``[B, T]`` bool on the CPU, true on padding, of rows that were shifted to start at 0."""
        return torch.arange(self.length)[None] >= torch.tensor(self.count)[:, None]

    def places(self, device: torch.device | str) -> Tensor | None:
        """``[B, T]`` int64: the token that a shifted row holds at each place; None: no shift."""
        if not any(self.first):
            return None
        tokens_BT = torch.arange(self.length)[None] + torch.tensor(self.first)[:, None]
        return (tokens_BT % self.length).to(device)


def whole_runs(batch: int, length: int) -> TokenRuns:
    """Every token of every row is real."""
    return TokenRuns((0,) * batch, (length,) * batch, length)


def runs_of_mask(real_BT: Tensor) -> TokenRuns:
    """Return the runs of a mask, true (or 1) on real tokens, ``[B, T]``. Waits for its device.

    Raises:
        ValueError: a row's real tokens are not one run.
    """
    real = real_BT.detach().to("cpu", torch.bool)
    count = real.sum(dim=1)
    first = real.int().argmax(dim=1)
    last = real.shape[1] - 1 - real.int().flip(1).argmax(dim=1)
    holes = (count > 0) & (last - first + 1 != count)
    if bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"row {row} of the attention mask has padding between its tokens: {int(count[row])} "
            f"real tokens spread over [{int(first[row])}, {int(last[row]) + 1}); "
            "padding may only precede or follow them"
        )
    return TokenRuns(tuple(first.tolist()), tuple(count.tolist()), real.shape[1])


def shift_to_start(tokens_BTX: Tensor, places_BT: Tensor | None) -> Tensor:
    """Move each row's run to its start; differentiable."""
    if places_BT is None:
        return tokens_BTX
    rows_B1 = torch.arange(places_BT.shape[0], device=places_BT.device)[:, None]
    return tokens_BTX[rows_B1, places_BT]


def shift_back(tokens_BTX: Tensor, places_BT: Tensor | None) -> Tensor:
    """Return the inverse of ``shift_to_start``; differentiable."""
    if places_BT is None:
        return tokens_BTX
    return shift_to_start(tokens_BTX, places_BT.argsort(dim=1))


def equal_rows(keys: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Rows grouped by equal keys, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())
