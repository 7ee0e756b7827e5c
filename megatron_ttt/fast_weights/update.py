"""The fast weight as a function: tensors in, outputs and state out.

    apply    O_i = Z_i (W0 + eta * S_i)^T         (rows before the first document start; else W0)
    update   S_{i+1} = k_i * S_i + V_i^T Z_i       (rows of the chunk's last document)

Same mathematics as ``reference.py``, in chunks, with one live state (``sweeps.py``).
In-Place TTT (arXiv 2604.06169) section 3.

Shape suffixes: B batch rows, T local tokens, D hidden, F ffn (the local shard under TP), N local
chunks, S local spans. Keys and targets may be strided views.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.scale import (
    Clip,
    Normalize,
    ReduceSums,
    scaled_targets,
)
from megatron_ttt.fast_weights.sweeps import CarryExchange, FastWeightScan, ScanCall


@dataclass(frozen=True)
class FastWeightOutput:
    """What reading a row gives.

    ``outputs_BTD``: compute dtype, differentiable.
    ``state_BDF``: S after the last complete chunk (of the last local span), float32 or float64,
    differentiable.
    ``keep_B``: float64, the factor the local tokens apply to the carry.
    ``state_squares_BN``: detached ``norm(S)^2`` of the state entering each chunk, for the update
    ratio (a local shard's under TP: sum over TP).
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
    learning_rate: float,
    chunk_size: int,
    carry_BDF: Tensor | None = None,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
    decay: float = 1.0,
    clip: Clip | None = None,
    normalize: Normalize = Normalize.NONE,
    reduce_sums: ReduceSums | None = None,
) -> FastWeightOutput:
    """``O_i = Z_i (W0 + eta S_i)^T``, ``S_{i+1} = gamma S_i + clip(V_i^T Z_i)`` over whole rows.

    Args:
        keys_BTF, targets_BTD, weight_DF: one compute dtype; differentiable.
        learning_rate: eta. 0 takes the plain dense path and still returns the state.
        chunk_size: C, tokens.
        carry_BDF: S entering each row, differentiable; None: zero.
        document_starts: bool ``[B, T]``, true on each document's first token; None: none.
        padding: bool ``[B, T]``, true on rows that occupy a place and are never written.
        decay: gamma per chunk, in (0, 1].
        clip, normalize: see ``scale.py``; constants in the backward.
        reduce_sums: sums small tensors over the ranks that share the rows' keys.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together.
    """
    plan = plan_chunks(
        document_starts,
        batch=keys_BTF.shape[0],
        length=keys_BTF.shape[1],
        chunk_size=chunk_size,
        decay=decay,
        padding_BT=padding,
        device=keys_BTF.device,
    )
    return fast_weight_spans(
        keys_BTF,
        targets_BTD,
        weight_DF,
        plan=plan,
        learning_rate=learning_rate,
        carry_BDF=carry_BDF,
        clip=clip,
        normalize=normalize,
        reduce_sums=reduce_sums,
    )


def fast_weight_spans(
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    *,
    plan: ChunkPlan,
    learning_rate: float,
    spans: int = 1,
    exchange: CarryExchange | None = None,
    carry_BDF: Tensor | None = None,
    clip: Clip | None = None,
    normalize: Normalize = Normalize.NONE,
    reduce_sums: ReduceSums | None = None,
) -> FastWeightOutput:
    """``fast_weight_linear`` on the tokens one context-parallel rank holds.

    Local tokens are ``spans`` equal runs of whole chunks, in the sequence's order (zigzag: 2).
    Cost in GEMMs of ``T x D x F``: 2 forward and 5 backward; with an exchange 3 and 6, since the
    summaries must exist before the carries; one more backward with decay or a gradient into the
    returned state.

    Args:
        plan: of the local tokens (``ChunkPlan.select_tokens``).
        exchange: gives each span what enters it; all ranks of the row must call. None: the tokens
            are whole rows.
        carry_BDF: enters the first local span on top of the exchange's carry: with an exchange only
            the owner of the row's first span passes one.

    Raises:
        ValueError: shapes or dtypes that do not fit, or several spans without an exchange.
    """
    _check_inputs(keys_BTF, targets_BTD, weight_DF, carry_BDF, plan)
    if exchange is None and spans != 1:
        raise ValueError(f"{spans} spans need an exchange to carry the state between them")
    if spans > 1 and plan.length % (spans * plan.chunk_size):
        raise ValueError(
            f"{plan.length} tokens are not {spans} equal spans of whole chunks of {plan.chunk_size}"
        )
    scaled_BTD = scaled_targets(
        keys_BTF,
        targets_BTD,
        weight_DF,
        plan=plan,
        learning_rate=learning_rate,
        clip=clip,
        normalize=normalize,
        reduce_sums=reduce_sums,
    )
    outputs_BTD, state_BDF, squares_BN = FastWeightScan.apply(
        keys_BTF,
        scaled_BTD,
        weight_DF,
        carry_BDF,
        ScanCall(plan, learning_rate, spans, exchange),
    )
    keep_B = plan.span_keeps(1)[0]
    return FastWeightOutput(outputs_BTD, state_BDF, keep_B, squares_BN)


def flush(
    state_BDF: Tensor,
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    *,
    learning_rate: float,
    document_starts: Tensor | None = None,
    padding: Tensor | None = None,
    decay: float = 1.0,
    clip: Clip | None = None,
    normalize: Normalize = Normalize.NONE,
    reduce_sums: ReduceSums | None = None,
) -> Tensor:
    """Write one chunk into the state: ``k * S + clip(V^T Z)`` over all tokens given, ``[B, D, F]``.

    For the unfinished last chunk, which ``fast_weight_linear`` applies and never writes (pass the
    ``T % C`` tokens after the last complete chunk), and for a decoder whose chunk has just filled.
    Rows that have nothing to write are all padding and keep their state. ``weight_DF`` and
    ``learning_rate`` only serve the clip. Differentiable.
    """
    plan = plan_chunks(
        document_starts,
        batch=keys_BTF.shape[0],
        length=keys_BTF.shape[1],
        chunk_size=keys_BTF.shape[1],
        decay=decay,
        padding_BT=padding,
        device=keys_BTF.device,
    )
    _check_inputs(keys_BTF, targets_BTD, weight_DF, state_BDF, plan)
    scaled_BTD = scaled_targets(
        keys_BTF,
        targets_BTD,
        weight_DF,
        plan=plan,
        learning_rate=learning_rate,
        clip=clip,
        normalize=normalize,
        reduce_sums=reduce_sums,
    )
    # A rate of 0 leaves the outputs to the dense path; only the state is wanted here.
    _, written_BDF, _ = FastWeightScan.apply(
        keys_BTF,
        scaled_BTD,
        weight_DF,
        state_BDF,
        ScanCall(plan, 0.0, 1, None),
    )
    return written_BDF


def _check_inputs(
    keys_BTF: Tensor,
    targets_BTD: Tensor,
    weight_DF: Tensor,
    carry_BDF: Tensor | None,
    plan: ChunkPlan,
) -> None:
    batch, length, ffn = keys_BTF.shape
    hidden = weight_DF.shape[0]
    if targets_BTD.shape != (batch, length, hidden) or weight_DF.shape[1] != ffn:
        raise ValueError(
            f"keys {list(keys_BTF.shape)}, targets {list(targets_BTD.shape)} and weight "
            f"{list(weight_DF.shape)} are not [B, T, F], [B, T, D] and [D, F]"
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
