"""The published layer, from its equations, against ours: what is equal, and what is not.

    python -m tests.unit.fast_weights.test_published        # the figures of docs/differences.md

The published training formulation (arXiv 2604.06169, section 3) makes one weight per chunk by a
running sum over the row's chunks; its cache keeps one weight and adds every chunk's update to it,
both in the dtype of the weights. Neither knows documents, padding, decay or normalisation.

Shape suffixes: B batch rows, T tokens, N chunks, C tokens of a chunk, D hidden, F ffn.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ttt.fast_weights.documents import plan_chunks
from megatron_ttt.fast_weights.target import target_from_source
from megatron_ttt.fast_weights.update import fast_weight_linear
from megatron_ttt.rule import Clip, ClipMode, UpdateRule

B, CHUNKS, C, D, FFN = 2, 5, 4, 6, 9
T = CHUNKS * C
ETA = 0.05
WRITES = 256  # of the sums in low precision


def published(
    keys_BTF: Tensor, source_BTD: Tensor, conv_D15: Tensor, proj_DD: Tensor, weight_DF: Tensor
) -> Tensor:
    """Outputs ``[B, T, D]``: chunk i by ``W0 + eta * sum of the updates of the chunks before``."""
    keys_BNCF = keys_BTF.unflatten(1, (-1, C))
    chunks_NDC = source_BTD.unflatten(1, (-1, C)).flatten(0, 1).mT
    mixed_NDC = F.conv1d(chunks_NDC, conv_D15, padding=2, groups=len(conv_D15))
    values_BNCD = mixed_NDC.mT.unflatten(0, keys_BNCF.shape[:2]) @ proj_DD
    updates_BNDF = torch.einsum("bncd,bncf->bndf", values_BNCD, keys_BNCF)
    before_BNDF = updates_BNDF.cumsum(dim=1) - updates_BNDF
    weights_BNDF = weight_DF + ETA * before_BNDF
    return torch.einsum("bncf,bndf->bncd", keys_BNCF, weights_BNDF).flatten(1, 2)


def ours(
    keys_BTF: Tensor,
    source_BTD: Tensor,
    conv_D15: Tensor,
    proj_DD: Tensor,
    weight_DF: Tensor,
    *,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
    **rule: object,
) -> Tensor:
    plan = plan_chunks(
        document_starts, batch=B, length=T, chunk_size=C, padding_BT=padding, device="cpu"
    )
    values_BTD = target_from_source(source_BTD, conv_D15, proj_DD, plan=plan)
    output = fast_weight_linear(
        keys_BTF,
        values_BTD,
        weight_DF,
        rule=UpdateRule(chunk_size=C, eta=ETA, **rule),  # type: ignore[arg-type]
        document_starts=document_starts,
        padding=padding,
    )
    return output.outputs_BTD


def drawn() -> list[Tensor]:
    """Keys, source, convolution, projection, W0: fp64, random, with gradients."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(B, T, FFN), (B, T, D), (D, 1, 5), (D, D), (D, FFN)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def test_outputs_and_every_gradient_are_equal() -> None:
    tensors, upstream = drawn(), torch.randn(B, T, D, dtype=torch.float64)
    found = [function(*tensors) for function in (published, ours)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(outputs, tensors, upstream) for outputs in found]
    for theirs, mine in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-11, atol=1e-11)
    keys, *_, weight = tensors
    assert (found[0] - keys @ weight.T).abs().max() > 0.5, "the fast weights changed nothing"


@torch.no_grad()
def test_documents_and_padding_are_unknown_to_it() -> None:
    tensors = drawn()
    theirs = published(*tensors)
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, [0, 2 * C]] = True
    mine = ours(*tensors, document_starts=starts)
    first, second = slice(0, 2 * C), slice(2 * C, T)
    torch.testing.assert_close(mine[:, first], theirs[:, first], rtol=1e-12, atol=1e-12)
    assert (mine - theirs)[:, second].abs().max() > 0.5  # it reads what the first one wrote
    alone = published(*[t[:, second] for t in tensors[:2]], *tensors[2:])
    torch.testing.assert_close(mine[:, second], alone, rtol=1e-12, atol=1e-12)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[:, C : 2 * C] = True
    after = slice(2 * C, T)
    assert (ours(*tensors, padding=padding) - theirs)[:, after].abs().max() > 0.1


def lost_shares(ratio: float, writes: int, *, hidden: int = 256, ffn: int = 768) -> list[float]:
    """What bf16 loses of ``eta S``: norm of the error over norm, (the published cache's, ours).

    Random updates of equal size whose sum has ``norm(eta S) = ratio * norm(W0)``. Theirs adds each
    to the weight in bf16; ours sums in fp32 and rounds ``W0 + eta S`` once.
    """
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(hidden, ffn, generator=generator)).bfloat16()
    scale = ratio * float(weight.float().norm()) / (hidden * ffn * writes) ** 0.5
    exact = torch.zeros(hidden, ffn, dtype=torch.float64)
    cached, state = weight.clone(), torch.zeros(hidden, ffn)
    for _ in range(writes):
        update = scale * torch.randn(hidden, ffn, generator=generator)
        exact += update
        cached = cached + update.bfloat16()
        state += update
    effective = (weight.float() + state).bfloat16()
    fast = [read.double() - weight.double() for read in (cached, effective)]
    return [float((read - exact).norm() / exact.norm()) for read in fast]


def test_a_sum_in_bfloat16_loses_most_of_a_small_update() -> None:
    theirs, mine = lost_shares(0.02, WRITES)
    assert 0.5 < theirs < 1.5 and mine < 0.2
    assert theirs > 4 * mine


@torch.no_grad()
def test_its_clip_leaves_nothing_in_bfloat16() -> None:
    """An absolute bound of 1e-5 on ``norm(eta M)`` is far below what a weight's rounding moves."""
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(1, WRITES, n, generator=generator) for n in (96, 64))
    weight = (0.02 * torch.randn(64, 96, generator=generator)).bfloat16()
    rule = UpdateRule(chunk_size=1, eta=ETA, clip=Clip(ClipMode.absolute, 1e-5))
    state = fast_weight_linear(keys, values, weight.float(), rule=rule).state_BDF[0]
    assert 0 < ETA * float(state.norm()) <= 1.001e-5 * WRITES
    changed = (weight.float() + ETA * state).bfloat16() != weight
    assert float(changed.float().mean()) < 0.05


@pytest.mark.parametrize("writes", [16, WRITES])
def test_both_lose_less_of_larger_updates(writes: int) -> None:
    small, large = (lost_shares(ratio, writes) for ratio in (0.02, 0.2))
    assert large[0] < small[0] and large[1] < small[1]


def main() -> None:
    print("update ratio  chunks  published  ours")
    for ratio in (0.02, 0.05, 0.2):
        for writes in (16, 64, 256):
            theirs, mine = lost_shares(ratio, writes)
            print(f"{ratio:12g}  {writes:6d}  {theirs:8.0%}  {mine:5.0%}")


if __name__ == "__main__":
    main()
