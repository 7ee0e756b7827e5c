"""What fast weights hold and say at chosen places of a row, measured while the model runs.

At the boundary before chunk i, with S the state that enters it:

    update ratio      norm(eta * S) / norm(W0)
    output ratio      norm(eta * S Z_i^T) / norm(W0 Z_i^T)      over the chunk's tokens that read S
    effective rank    exp(entropy of S's singular values, normalised to sum 1)
    mean-key share    norm(dW z)^2 / norm(dW)^2                 z: unit mean key of chunk i-1

where dW is what chunk i-1, the last before the boundary, has written. Norms are Frobenius. A mean
is arithmetic, over the rows for which the figure exists. Effective rank: Roy and Vetterli,
"The effective rank", EUSIPCO 2007. The last share is the part of a write that lies along one
direction, which every query that resembles the mean key reads alike: a bias, no memory.

Nothing of the model is changed: hooks in front of the fast layers make keys and targets a second
time and walk the chunks with the functions that the layers use, so the states are theirs. Under
tensor parallelism squares, Gram matrices and partial outputs are summed over the tensor ranks.

Shape suffixes: B batch rows, T tokens, D hidden, F ffn (the local shard under TP), P places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.fast_weights.accumulate import wide_product
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.scale import ReduceSums, squares, update_ratio
from megatron_ttt.fast_weights.update import fast_weight_scan
from megatron_ttt.fast_weights.write_rules import Write
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.sequence_layout import SequenceLayout

FIGURES = ("update_ratio", "output_ratio", "effective_rank", "mean_key_share")


def chosen_places(*, chunks: int, positions: int) -> list[int]:
    """Up to ``positions`` chunks, evenly spaced, the last one included; a state enters each.

    Nothing has been written when chunk 0 begins, so it is never among them.
    """
    last = chunks - 1
    return sorted({max(1, round(last * (i + 1) / positions)) for i in range(positions) if last})


def output_ratio(
    state_BDF: Tensor,
    keys_BTF: Tensor,
    reads_BT: Tensor,
    weight_DF: Tensor,
    *,
    eta: float,
    reduce_sums: ReduceSums,
) -> Tensor:
    """``norm(eta S z) / norm(W0 z)`` over the tokens of ``reads_BT``, ``[B]`` float64.

    Not a number for rows without such tokens.
    """
    read_BTF = keys_BTF.masked_fill(~reads_BT[..., None], 0.0).to(state_BDF.dtype)
    remembered_BTD = reduce_sums(read_BTF @ state_BDF.mT)
    plain_BTD = reduce_sums(read_BTF @ weight_DF.to(state_BDF.dtype).T)
    return abs(eta) * (squares(remembered_BTD) / squares(plain_BTD)).sqrt()


def effective_rank(gram_DD: Tensor) -> float:
    """``exp(-sum_i p_i log p_i)``, ``p_i`` the singular values' shares of their sum.

    Args:
        gram_DD: ``S S^T``, whose eigenvalues are the squares of S's singular values; float64, else
            the small ones drown in its rounding.

    Returns:
        Between 1 and the rank; not a number for a zero matrix and one that is not finite.
    """
    if not bool(gram_DD.isfinite().all()):
        return float("nan")
    singular = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def mean_key_share(
    keys_BTF: Tensor, targets_BTD: Tensor, written_BT: Tensor, *, reduce_sums: ReduceSums
) -> Tensor:
    """``norm(dW z)^2 / norm(dW)^2``, ``dW = sum_t v_t k_t^T``, z the unit mean of the keys k_t.

    ``[B]`` float64, in [0, 1]; not a number for rows that write nothing. A factor on a row's
    targets (clip, normalisation) changes nothing.
    """
    written_BTF = keys_BTF.masked_fill(~written_BT[..., None], 0.0)
    summary_BDF = wide_product(targets_BTD.masked_fill(~written_BT[..., None], 0.0).mT, written_BTF)
    sum_BF1 = written_BTF.to(summary_BDF.dtype).sum(dim=1)[..., None]  # the mean's direction
    along_BD1 = reduce_sums(summary_BDF @ sum_BF1)
    squares_2B = reduce_sums(torch.stack([squares(summary_BDF), squares(sum_BF1)]))
    return squares(along_BD1) / squares_2B.prod(dim=0)


def entering_states(
    mlp: FastWeightMLP,
    keys_BTF: Tensor,
    write: Write,
    plan: ChunkPlan,
    chunks: Sequence[int],
) -> Iterator[tuple[int, Tensor]]:
    """Yield the layer's state ``[B, D, F]`` that enters each of ``chunks``, ascending from 1.

    One state is alive at a time: take from it what is needed before the next.
    """
    state_BDF: Tensor | None = None
    reached = 0
    for chunk in chunks:
        assert reached < chunk < plan.chunks, f"chunk {chunk} after {reached} of {plan.chunks}"
        first, last = plan.tokens_of(reached)[0], plan.tokens_of(chunk)[0]
        state_BDF = fast_weight_scan(
            keys_BTF[:, first:last],
            write.select(plan, range(reached, chunk)),
            mlp.linear_fc2.weight,
            plan=plan.select_tokens([(first, last)]),
            eta=mlp.rule.eta,
            carry_BDF=state_BDF,
        ).state_BDF
        reached = chunk
        yield chunk, state_BDF


class StateProbe:
    """Sums of the figures over all rows that a model reads while the probe is attached."""

    def __init__(self, places: Sequence[int], *, device: torch.device) -> None:
        """``places``: the chunks at whose beginning states are looked at, ascending from 1."""
        self.places = list(places)
        self.device = device
        self._sums_2GP: dict[int, Tensor] = {}  # sums and counts, for each of FIGURES and places

    @contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """Look at every fast layer of ``model`` before it runs."""
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, FastWeightMLP):
                    handle = module.register_forward_pre_hook(self._look, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def means(self, group: Any) -> dict[int, Tensor]:
        """By layer, the mean of each figure at each place over the rows of all of ``group``.

        Returns:
            ``[G, P]`` float64 on the CPU, in the order of :data:`FIGURES`; not a number where no
            row has the figure.
        """
        found = {}
        for layer in sorted(self._sums_2GP):
            dist.all_reduce(self._sums_2GP[layer], group=group)
            totals, counts = self._sums_2GP[layer].cpu()
            found[layer] = totals / counts
        return found

    @torch.no_grad()
    def _look(self, mlp: FastWeightMLP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layout: SequenceLayout = kwargs["padding_mask"]
        if layout.plan is None:  # read with fast weights off
            return
        keys_BTF, write = mlp.keys_and_write(args[0], layout)
        shape = (2, len(FIGURES), len(self.places))
        sums_2GP = torch.zeros(shape, dtype=torch.float64, device=self.device)
        sums_2GP = self._sums_2GP.setdefault(mlp.layer, sums_2GP)
        states = entering_states(mlp, keys_BTF, write, layout.plan, self.places)
        for place, (chunk, state_BDF) in enumerate(states):
            figures_GB = _figures(mlp, state_BDF, keys_BTF, write, layout.plan, chunk)
            exists_GB = ~figures_GB.isnan()
            sums_2GP[0, :, place] += figures_GB.nan_to_num(nan=0.0, posinf=torch.inf).sum(dim=1)
            sums_2GP[1, :, place] += exists_GB.sum(dim=1)


def _figures(
    mlp: FastWeightMLP,
    state_BDF: Tensor,
    keys_BTF: Tensor,
    write: Write,
    plan: ChunkPlan,
    chunk: int,
) -> Tensor:
    """Each of :data:`FIGURES` at the beginning of ``chunk``, ``[G, B]`` float64."""
    weight_DF, eta = mlp.linear_fc2.weight, mlp.rule.eta
    reduce_sums = mlp.sum_over_tensor_ranks
    before, here = (slice(*plan.tokens_of(c)) for c in (chunk - 1, chunk))
    reads_BT = plan.reads_carry_BT[:, here]
    if plan.padding_BT is not None:
        reads_BT = reads_BT & ~plan.padding_BT[:, here]
    whole = reduce_sums(torch.cat([squares(state_BDF), squares(weight_DF[None])]))
    ratio_B = update_ratio(whole[:-1], whole[-1], eta=eta)
    heard_B = output_ratio(
        state_BDF,
        keys_BTF[:, here],
        reads_BT,
        weight_DF,
        eta=eta,
        reduce_sums=reduce_sums,
    )
    write_keys_BTF = keys_BTF if write.keys_BTF is None else write.keys_BTF
    share_B = mean_key_share(
        write_keys_BTF[:, before],
        write.targets_BTD[:, before],
        plan.writes_BT[:, before],
        reduce_sums=reduce_sums,
    )
    ranks = []
    for state_DF in state_BDF:
        wide_DF = state_DF.double()
        ranks.append(effective_rank(reduce_sums(wide_DF @ wide_DF.mT)))
    rank_B = torch.tensor(ranks, dtype=torch.float64, device=ratio_B.device)
    # A state that is not a number is beyond every bound; it must not pass as one that is not there.
    ratio_B = ratio_B.nan_to_num(nan=torch.inf)
    return torch.stack([ratio_B, heard_B, rank_B, share_B])
