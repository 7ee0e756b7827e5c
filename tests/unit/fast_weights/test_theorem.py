"""Theorem 1 of In-Place TTT (arXiv 2604.06169) in numbers: which target puts the gain where.

One pair (k*, v*) is read in an earlier chunk, and k* again later. Keys of the same token have inner
product c on average, those of different tokens 0; embeddings are orthogonal within eps. With logits
read as ``e^T dW z``, the target aligned with language modelling (the next token's embedding) gives

    E[dlogit(v*)] = eta * |e_v*|^2 * c        and every other within eta * eps * c,

the reconstruction target (the token's own embedding) leaves dlogit(v*) within eta * eps * c.

Shape suffixes: B draws, T tokens, V vocabulary, D hidden, F ffn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ttt.fast_weights import fast_weight_linear, plan_chunks, target_from_source
from megatron_ttt.rule import UpdateRule

VOCABULARY, HIDDEN, FFN, CHUNK = 12, 96, 24, 8
ETA, ALIGNMENT = 0.3, 0.7
KEY, VALUE = 3, 9  # k* and v*
TOKENS = [5, 1, KEY, VALUE, 0, 7, 11, 2, KEY]  # the pair inside the first chunk, k* after it


def embeddings() -> tuple[Tensor, float]:
    """Nearly orthogonal rows of different lengths, and their largest inner product eps."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True) * torch.linspace(0.8, 1.2, VOCABULARY)[:, None]
    products = rows @ rows.T
    return rows, float((products - products.diag().diag()).abs().max())


def keys(draws: int) -> Tensor:
    """k*'s keys share a direction of squared length c, all else is noise across it.

    Each draw comes with its mirror image (the stored tokens' noise negated), so that the mean over
    draws is the expectation itself and not an estimate.
    """
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(draws, len(TOKENS), FFN, generator=generator, dtype=torch.float64)
    noise[..., 0] = 0
    noise = torch.cat([noise, noise])
    noise[draws:, :-1] *= -1
    shared = torch.zeros(len(TOKENS), FFN, dtype=torch.float64)
    shared[[t for t, token in enumerate(TOKENS) if token == KEY], 0] = ALIGNMENT**0.5
    return noise + shared


def expected_logit_changes(conv_taps: list[float] | None) -> Tensor:
    """Mean of ``e_v^T (O - Z W0^T)`` at the last token, ``[V]``."""
    table_VD, _ = embeddings()
    keys_BTF = keys(draws=32)
    batch, length, _ = keys_BTF.shape
    conv = None
    if conv_taps is not None:
        conv = torch.tensor(conv_taps, dtype=torch.float64).expand(HIDDEN, 1, 5)
    source = table_VD[TOKENS].expand(batch, length, HIDDEN)
    plan = plan_chunks(None, batch=batch, length=length, chunk_size=CHUNK, device="cpu")
    weight = torch.randn(HIDDEN, FFN, generator=torch.Generator().manual_seed(3)).double()
    outputs = fast_weight_linear(
        keys_BTF,
        target_from_source(source, conv, None, plan=plan),
        weight,
        rule=UpdateRule(eta=ETA, chunk_size=CHUNK),
    ).outputs_BTD
    change_BD = (outputs - keys_BTF @ weight.T)[:, -1]
    return (change_BD @ table_VD.T).mean(dim=0)


def test_lm_aligned_target_gains_on_the_right_token() -> None:
    table, eps = embeddings()
    changes = expected_logit_changes([0, 0, 0, 1, 0])  # tap 3: the next token
    gain = ETA * table[VALUE].square().sum() * ALIGNMENT
    torch.testing.assert_close(changes[VALUE], gain)
    others = [v for v in range(VOCABULARY) if v != VALUE]
    assert changes[others].abs().max() <= ETA * eps * ALIGNMENT * (1 + 1e-9)
    assert changes[VALUE] > 2 * changes[others].abs().max()


def test_reconstruction_target_does_not() -> None:
    table, eps = embeddings()
    changes = expected_logit_changes(None)
    assert changes[VALUE].abs() <= ETA * eps * ALIGNMENT * (1 + 1e-9)
    torch.testing.assert_close(changes[KEY], ETA * table[KEY].square().sum() * ALIGNMENT)


def test_looking_back_instead_of_ahead_does_not_either() -> None:
    """The orientation of the conv: tap 1 is the token before, which is not what follows k*."""
    _, eps = embeddings()
    changes = expected_logit_changes([0, 1, 0, 0, 0])
    assert changes[VALUE].abs() <= ETA * eps * ALIGNMENT * (1 + 1e-9)
