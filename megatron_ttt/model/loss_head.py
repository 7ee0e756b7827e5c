"""The loss in pieces of the sequence, so that the logits of all tokens never exist together.

Logits of 32,768 tokens over a vocabulary of 151,936 and what the loss makes of them are about 30 GB
in bf16. Here the output layer and the loss, Megatron's own, run over some tokens at a time inside
torch's checkpoint: the backward makes a piece's logits once more, which costs one product of the
output layer.

Shape letters: B batch rows, L tokens of this rank, H hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def losses_in_pieces(
    hidden_LBH: Tensor,
    labels_BL: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    tokens: int,
    gathered: int,
) -> Tensor:
    """Loss of every token, ``[B, L]``.

    Args:
        hidden_LBH: what the output layer reads; with sequence parallelism this rank's part of the
            tokens, which the layer gathers.
        labels_BL: of all tokens.
        loss_of: output layer and loss: (hidden, labels ``[B, P]`` of a piece) to losses ``[B, P]``;
            gathered tokens come rank after rank.
        tokens: about how many have logits at a time.
        gathered: tensor-parallel ranks whose tokens the output layer joins; 1 without.
    """
    batch, own = labels_BL.shape[0], hidden_LBH.shape[0]
    labels_BRL = labels_BL.unflatten(1, (gathered, own))
    size = max(1, tokens // (batch * gathered))
    pieces = []
    for start in range(0, own, size):
        piece = slice(start, start + size)
        losses_BP = checkpoint(
            loss_of,
            hidden_LBH[piece],
            labels_BRL[:, :, piece].flatten(1),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        pieces.append(losses_BP.unflatten(1, (gathered, -1)))
    return torch.cat(pieces, dim=2).flatten(1)
