"""The fast weight as a function: tensors in, outputs and state out.

    apply    O_i = Z_i (W0 + eta * S_i)^T         (rows before the first document start; else W0)
    update   S_{i+1} = k_i * S_i + L_i^T R_i       (rows of the chunk's last document)

L, R and a factor of k are what the write rule (``write_rules.py``) makes of targets and keys. Same
mathematics as ``reference.py``, in chunks, with one live state (``sweeps.py``).
In-Place TTT (arXiv 2604.06169) section 3.

Shape suffixes: B batch rows, T local tokens, D hidden, F ffn (the local shard under TP), N local
chunks, S local spans. Keys and targets may be strided views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.exchange import CarryExchange
from megatron_ttt.fast_weights.groups import group_size
from megatron_ttt.fast_weights.inside import InsideScores
from megatron_ttt.fast_weights.scale import ReduceSums
from megatron_ttt.fast_weights.scan_call import ScanCall
from megatron_ttt.fast_weights.sweeps import FastWeightScan
from megatron_ttt.fast_weights.write_rules import TokenInputs, Write, WriteCall, plain
from megatron_ttt.rule import UpdateRule


@dataclass(frozen=True)
class FastWeightOutput:
    """What reading a row gives.

    ``outputs_BTD``: compute dtype, differentiable.
    ``state_BDF``: S after the last complete chunk (of the last local span), float32 or float64,
    differentiable.
    ``keep_B``: float64, the factor the local tokens apply to the carry.
    ``state_squares_BN``: detached ``norm(S)^2`` of the state entering each chunk, for the update
    ratio (a local shard's under TP: sum over TP); ``[B, 0]`` where it was not asked for.
    """

    outputs_BTD: Tensor
    state_BDF: Tensor
    keep_B: Tensor
    state_squares_BN: Tensor


def fast_weight_linear(
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    *,
    rule: UpdateRule,
    carry_BDF: Tensor | None = None,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
    reduce_sums: ReduceSums | None = None,
) -> FastWeightOutput:
    """``O_i = Z_i (W0 + eta S_i)^T``, ``S_{i+1} = gamma S_i + clip(V_i^T Z_i)`` over whole rows.

    The plain write of whole rows; layers call the parts (``write_rules.write`` and
    :func:`fast_weight_scan`).

    Args:
        keys_BTF, targets_BTD, weight_DF: one compute dtype; differentiable.
        rule: eta (0 takes the dense path and still returns the state), chunk size, decay, clip and
            normalisation.
        carry_BDF: S entering each row, differentiable; None: zero.
        document_starts: bool ``[B, T]``, true on each document's first token; None: none.
        padding: bool ``[B, T]``, true on rows that occupy a place and are never written.
        reduce_sums: sums small tensors over the ranks that share the rows' keys.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together.
    """
    plan = plan_chunks(
        document_starts,
        batch=keys_BTF.shape[0],
        length=keys_BTF.shape[1],
        chunk_size=rule.chunk_size,
        decay=rule.decay,
        padding_BT=padding,
        device=keys_BTF.device,
    )
    # Before the rule, which would meet shapes that do not fit with less to say about them.
    _check_inputs(keys_BTF, Write(targets_BTD), weight_DF, carry_BDF, plan)
    call = WriteCall(rule, plan, weight_DF, {}, reduce_sums)
    write = plain(TokenInputs(keys_BTF, targets_BTD), targets_BTD, call)
    return fast_weight_scan(
        keys_BTF,
        write,
        weight_DF,
        plan=plan,
        eta=rule.eta,
        carry_BDF=carry_BDF,
        wants_norms=True,
    )


def fast_weight_scan(
    keys_BTF: Tensor,
    write: Write,
    weight_DF: Tensor,
    *,
    plan: ChunkPlan,
    eta: float,
    spans: int = 1,
    exchange: CarryExchange | None = None,
    carry_BDF: Tensor | None = None,
    group_chunks: int | None = None,
    scores: InsideScores | None = None,
    wants_norms: bool = False,
) -> FastWeightOutput:
    """``O_i = Z_i (W0 + eta S_i)^T``, ``S_{i+1} = f_i k_i S_i + L_i^T R_i`` on a rank's tokens.

    Local tokens are ``spans`` equal runs of whole chunks, in the sequence's order (zigzag: 2).
    Cost in GEMMs of ``T x D x F``: 2 forward and 5 backward; with an exchange 3 and 6, since the
    summaries must exist before the carries; one more backward with decay, factors, or a gradient
    into the returned state.

    Args:
        keys_BTF: Z, differentiable.
        write: L, R and f of the same tokens.
        weight_DF: W0, differentiable.
        plan: of the local tokens (``ChunkPlan.select_tokens``).
        eta: 0 takes the dense path and still returns the state.
        exchange: gives each span what enters it; all ranks of the row must call. None: the tokens
            are whole rows.
        carry_BDF: enters the first local span on top of the exchange's carry: with an exchange only
            the owner of the row's first span passes one.
        group_chunks: chunks that touch the state together (``groups.py``); None: by the sizes.
        scores: of a group's inside (``inside.py``); None: by the device.
        wants_norms: whether ``state_squares_BN`` is made; in groups of several chunks it costs a
            product and a pass over the state for every chunk.

    Raises:
        ValueError: shapes or dtypes that do not fit, several spans without an exchange, or groups
            of several chunks with decay or factors.
    """
    _check_inputs(keys_BTF, write, weight_DF, carry_BDF, plan)
    if exchange is None and spans != 1:
        raise ValueError(f"{spans} spans need an exchange to carry the state between them")
    if spans > 1 and plan.length % (spans * plan.chunk_size):
        raise ValueError(
            f"{plan.length} tokens are not {spans} equal spans of whole chunks of {plan.chunk_size}"
        )
    if (group_chunks or 1) > 1 and (plan.decays or write.factors_BN is not None):
        raise ValueError(f"groups of {group_chunks} chunks know neither decay nor factors: 1")
    outputs_BTD, state_BDF, squares_BN = FastWeightScan.apply(
        keys_BTF,
        write.targets_BTD,
        write.keys_BTF,
        weight_DF,
        carry_BDF,
        ScanCall(
            plan,
            eta,
            spans,
            exchange,
            write.factors_BN,
            group_chunks=group_chunks or _group_chunks(keys_BTF, write, weight_DF, plan),
            scores=scores or _scores(keys_BTF),
            wants_norms=wants_norms,
        ),
    )
    keep_B = plan.span_keeps(1)[0]
    if write.factors_BN is not None:
        keep_B = keep_B * write.factors_BN.prod(dim=1).to(keep_B.dtype)
    return FastWeightOutput(outputs_BTD, state_BDF, keep_B, squares_BN)


def _group_chunks(keys_BTF: Tensor, write: Write, weight_DF: Tensor, plan: ChunkPlan) -> int:
    return group_size(
        plan,
        hidden=weight_DF.shape[0],
        ffn=weight_DF.shape[1],
        is_cpu=keys_BTF.is_cpu,
        has_factors=write.factors_BN is not None,
    )


def _scores(keys_BTF: Tensor) -> InsideScores:
    # A CPU's groups are short; on a GPU scores would be a tenth of what a layer keeps.
    kept = keys_BTF.is_cpu and torch.is_grad_enabled()
    return InsideScores.KEPT if kept else InsideScores.REMADE


def written_state(
    state_BDF: Tensor, keys_BTF: Tensor, write: Write, weight_DF: Tensor, *, plan: ChunkPlan
) -> Tensor:
    """Return the state behind the plan's chunks: ``f k S + L^T R``, ``[B, D, F]``. Differentiable.

    For the unfinished last chunk, which :func:`fast_weight_scan` applies and never writes (lay a
    plan of one chunk over its tokens), and for a decoder whose chunk has just filled. Rows that
    have nothing to write are all padding and keep their state. ``weight_DF`` gives the shape alone.
    """
    _check_inputs(keys_BTF, write, weight_DF, state_BDF, plan)
    # A rate of 0 leaves the outputs to the dense path; only the state is wanted here.
    _, written_BDF, _ = FastWeightScan.apply(
        keys_BTF,
        write.targets_BTD,
        write.keys_BTF,
        weight_DF,
        state_BDF,
        ScanCall(plan, 0.0, 1, None, write.factors_BN),
    )
    return written_BDF


def _check_inputs(
    keys_BTF: Tensor,
    write: Write,
    weight_DF: Tensor,
    carry_BDF: Tensor | None,
    plan: ChunkPlan,
) -> None:
    targets_BTD, write_keys_BTF = write.targets_BTD, write.keys_BTF
    batch, length, ffn = keys_BTF.shape
    hidden = weight_DF.shape[0]
    if targets_BTD.shape != (batch, length, hidden) or weight_DF.shape[1] != ffn:
        raise ValueError(
            f"keys {list(keys_BTF.shape)}, targets {list(targets_BTD.shape)} and weight "
            f"{list(weight_DF.shape)} are not [B, T, F], [B, T, D] and [D, F]"
        )
    if write_keys_BTF is not None and (
        write_keys_BTF.shape != keys_BTF.shape or write_keys_BTF.dtype != keys_BTF.dtype
    ):
        raise ValueError(
            f"write keys {write_keys_BTF.dtype} {list(write_keys_BTF.shape)} are not like keys "
            f"{keys_BTF.dtype} {list(keys_BTF.shape)}"
        )
    if not keys_BTF.dtype == targets_BTD.dtype == weight_DF.dtype:
        raise ValueError(
            f"keys {keys_BTF.dtype}, targets {targets_BTD.dtype} and weight {weight_DF.dtype} "
            "have different dtypes"
        )
    if carry_BDF is not None and carry_BDF.shape != (batch, hidden, ffn):
        raise ValueError(f"carry {list(carry_BDF.shape)} is not [{batch}, {hidden}, {ffn}]")
    if (plan.batch, plan.length) != (batch, length):
        raise ValueError(f"plan is for [{plan.batch}, {plan.length}], keys are [{batch}, {length}]")
