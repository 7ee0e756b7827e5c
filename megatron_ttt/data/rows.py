"""Rows of raw token ids to what a model is given: labels, counted losses, documents.

Shapes: B rows of a batch, T tokens of a row, R = T + 1 (a row and the token after it).

Everything follows from the ids: a document ends with the end-of-document token ``eod``; ``pad``
(None if the data has none) fills places and is not text. All of it is computed on whole rows,
before any cut across ranks: the first token of a rank's part is not a document start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of whole rows, in sequence order, identical on every rank of a model replica.

    ``loss_mask_BT`` is true where the loss of predicting ``labels_BT`` counts;
    ``document_starts_BT`` on the first token of every document as this row sees it, so always at 0;
    ``padding_BT`` where ``tokens_BT`` is padding; ``sample_ids_B`` is each row's place in the
    order of the whole run, counted from 0.
    """

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64
    loss_mask_BT: Tensor  # bool
    document_starts_BT: Tensor  # bool
    padding_BT: Tensor  # bool
    sample_ids_B: Tensor  # int64

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory; the DataLoader calls this under ``pin_memory``."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        return Batch(
            **{
                f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
                for f in fields(self)
            }
        )


def document_starts(tokens_BT: Tensor, padding_BT: Tensor, *, eod: int) -> Tensor:
    """Return true at a row's first token, and at each real token whose real predecessor is ``eod``.

    Padding between an ``eod`` and the next document belongs to neither: the start is the first
    real token after it. A row that opens with padding has two starts, its place 0 and its first
    real token, and no state between them.
    """
    rows, length = tokens_BT.shape
    places_T = torch.arange(length, device=tokens_BT.device)
    # place of the nearest real token at or before each place, -1 if there is none
    real_BT = torch.where(padding_BT, -1, places_T).cummax(dim=1).values
    before_BT = torch.cat([real_BT.new_full((rows, 1), -1), real_BT[:, :-1]], dim=1)
    ends_BT = tokens_BT.gather(1, before_BT.clamp(min=0)) == eod
    starts_BT = ~padding_BT & (ends_BT | (before_BT < 0))
    starts_BT[:, 0] = True
    return starts_BT


def make_batch(
    text_BR: Tensor,
    sample_ids: Sequence[int],
    *,
    eod: int,
    pad: int | None,
    mask_document_end: bool = False,
) -> Batch:
    """Cut rows of T + 1 ids into inputs and labels and mark their documents.

    The loss of predicting a pad token, and of predicting anything from one, never counts. With
    ``mask_document_end`` predicting the first token of the next document from ``eod`` does not
    count either: that prediction crosses a boundary.
    """
    tokens_BT, labels_BT = text_BR[:, :-1].contiguous(), text_BR[:, 1:].contiguous()
    if pad is None:
        padding_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        loss_mask_BT = ~padding_BT
    else:
        padding_BT = tokens_BT == pad
        loss_mask_BT = ~padding_BT & (labels_BT != pad)
    if mask_document_end:
        loss_mask_BT &= tokens_BT != eod
    starts_BT = document_starts(tokens_BT, padding_BT, eod=eod)
    return Batch(
        tokens_BT=tokens_BT,
        labels_BT=labels_BT,
        loss_mask_BT=loss_mask_BT,
        document_starts_BT=starts_BT,
        padding_BT=padding_BT,
        sample_ids_B=torch.tensor(list(sample_ids), dtype=torch.int64),
    )
