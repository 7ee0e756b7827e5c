"""Random fast-weight problems, small and alive, and the ways to solve them.

Every problem draws an asymmetric conv, a dense ``W_target`` and a rate that makes the update about
a tenth of ``W0``: a diagonal projection would hide a transposition, a zero conv everything.

Shape suffixes: B batch rows, T tokens, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_ttt.fast_weights import (
    CarryExchange,
    ChunkPlan,
    Direction,
    TokenInputs,
    Write,
    WriteCall,
    fast_weight_scan,
    plan_chunks,
    target_from_source,
    write,
)
from megatron_ttt.fast_weights.reference import (
    reference_fast_weight,
    reference_gate,
    reference_target,
)
from megatron_ttt.rule import (
    GATE,
    GATE_BIAS,
    Clip,
    ClipMode,
    Conv,
    Normalize,
    UpdateRule,
    WriteKind,
    WriteSettings,
)

GATE_GRADIENTS = ("hidden", "gate", "gate_bias")
GRADIENTS = ("keys", "source", "conv", "proj", "weight", "carry", "write_keys", *GATE_GRADIENTS)


@dataclass(frozen=True)
class Case:
    """One problem: sizes, document layout and options; its numbers follow from the seed."""

    batch: int = 2
    length: int = 21
    chunk_size: int = 4
    hidden: int = 5
    ffn: int = 7
    starts: tuple[tuple[int, ...], ...] = ()  # per row: tokens on which a document starts
    padding: tuple[tuple[int, ...], ...] = ()  # per row: padding tokens
    decay: float = 1.0
    clip: Clip = field(default_factory=Clip)
    conv: Conv = Conv.learned
    kernel_size: int = 5
    normalize: Normalize = Normalize.none
    has_carry: bool = False
    has_write_keys: bool = False  # writes go under keys of their own
    has_factors: bool = False  # keeps depend on data: a random factor per row and chunk
    write: WriteSettings = field(default_factory=WriteSettings)
    uses_state: bool = True  # a gradient flows into the returned state
    update_ratio: float = 0.1  # 0: a rate of zero
    seed: int = 0

    def mask(self, tokens: tuple[tuple[int, ...], ...]) -> Tensor | None:
        if not tokens:
            return None
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for row, places in enumerate(tokens):
            mask[row, list(places)] = True
        return mask


@dataclass(frozen=True)
class Solution:
    outputs: Tensor
    state: Tensor
    gradients: dict[str, Tensor]


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "keys": draw(case.batch, case.length, case.ffn),
        "source": draw(case.batch, case.length, case.hidden),
        "conv": draw(case.hidden, 1, case.kernel_size) / 2,
        "proj": draw(case.hidden, case.hidden) / 2,
        "weight": draw(case.hidden, case.ffn),
        "carry": draw(case.batch, case.hidden, case.ffn),
        "d_outputs": draw(case.batch, case.length, case.hidden),
        "d_state": draw(case.batch, case.hidden, case.ffn),
        "write_keys": draw(case.batch, case.length, case.ffn),
        "factors": _factors(case, draw),
        "hidden": draw(case.batch, case.length, case.hidden),
        "gate": draw(case.hidden) / 2,
        "gate_bias": draw(1) / 2,
    }


def kernel_of(case: Case, tensors: dict[str, Tensor]) -> Tensor | None:
    """The convolution's weight where it has one."""
    return tensors["conv"] if case.conv.is_learned else None


def _factors(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    """A factor in (0.5, 1) for each chunk that writes, else 1: ``[B, N]``."""
    plan = plan_chunks(
        case.mask(case.starts),
        batch=case.batch,
        length=case.length,
        chunk_size=case.chunk_size,
        padding_BT=case.mask(case.padding),
        device="cpu",
    )
    factors = draw(case.batch, plan.chunks).sigmoid() / 2 + 0.5
    return torch.where(plan.sum_chunks(plan.writes_BT.long()) > 0, factors, 1.0)


def update_rule(case: Case) -> UpdateRule:
    return UpdateRule(
        chunk_size=case.chunk_size,
        eta=eta_of(case),
        decay=case.decay,
        clip=case.clip,
        conv=case.conv,
        kernel_size=case.kernel_size,
        normalize=case.normalize,
        write=case.write,
    )


def eta_of(case: Case) -> float:
    """The rate at which everything the row could write is ``update_ratio`` of ``W0``."""
    tensors = inputs(case)
    if case.normalize is Normalize.spectral:  # every chunk writes a matrix of spectral norm 1
        chunks = -(-case.length // case.chunk_size)
        return float(case.update_ratio * torch.linalg.matrix_norm(tensors["weight"], 2) / chunks)
    summary = torch.einsum("btd,btf->bdf", tensors["source"] @ tensors["proj"], tensors["keys"])
    rate = case.update_ratio * tensors["weight"].norm() / summary[0].norm()
    if case.normalize is Normalize.key_energy:
        rate = rate * tensors["keys"].square().sum(dim=2).mean()
    return float(rate)


def differentiate(
    case: Case, tensors: dict[str, Tensor], outputs: Tensor, state: Tensor
) -> Solution:
    loss = (outputs * tensors["d_outputs"]).sum()
    if case.uses_state:
        # Weighed by the rate so that no term drowns the others.
        loss = loss + case.update_ratio * (state * tensors["d_state"]).sum()
    absent = {
        "carry": not case.has_carry,
        "write_keys": not case.has_write_keys,
        "conv": not case.conv.is_learned,
        **dict.fromkeys(GATE_GRADIENTS, case.write.kind is not WriteKind.gated),
    }
    wanted = [name for name in GRADIENTS if not absent.get(name, False)]
    gradients = torch.autograd.grad(loss, [tensors[name] for name in wanted], allow_unused=True)
    return Solution(
        outputs.detach(),
        state.detach(),
        {
            name: torch.zeros_like(tensors[name]) if gradient is None else gradient
            for name, gradient in zip(wanted, gradients, strict=True)
        },
    )


def leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: tensor.requires_grad_(name in GRADIENTS)
        for name, tensor in inputs(case, dtype).items()
    }


def solve_reference(case: Case) -> Solution:
    tensors = leaves(case, torch.float64)
    layout = {
        "chunk_size": case.chunk_size,
        "document_starts": case.mask(case.starts),
        "padding": case.mask(case.padding),
        "normalize": case.normalize,
    }
    targets = reference_target(
        tensors["source"], kernel_of(case, tensors), tensors["proj"], conv=case.conv, **layout
    )
    if case.write.kind is WriteKind.gated:
        gate = reference_gate(tensors["hidden"], tensors["gate"], tensors["gate_bias"])
        targets = targets * gate[..., None]
    outputs, state = reference_fast_weight(
        tensors["keys"],
        targets,
        tensors["weight"],
        eta=eta_of(case),
        carry_BDF=tensors["carry"] if case.has_carry else None,
        decay=case.decay,
        clip=case.clip,
        write_keys_BTF=tensors["write_keys"] if case.has_write_keys else None,
        factors_BN=tensors["factors"] if case.has_factors else None,
        bound=case.write.bound if case.write.kind is WriteKind.bounded else None,
        **layout,
    )
    return differentiate(case, tensors, outputs, state)


def solve_chunked(
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    spans: int = 1,
    exchange: Callable[[Tensor], CarryExchange] | None = None,
    tokens_first: bool = False,
    poison: dict[str, tuple[int, float]] | None = None,
) -> Solution:
    """Solve by the chunked scan.

    ``exchange`` makes one from the spans' keeps; ``tokens_first`` takes Megatron's strides;
    ``poison`` sets the first column of a token of an input to a value.
    """
    tensors = leaves(case, dtype)
    for name, (token, value) in (poison or {}).items():
        tensors[name].data[:, token, 0] = value
    plan = plan_chunks(
        case.mask(case.starts),
        batch=case.batch,
        length=case.length,
        chunk_size=case.chunk_size,
        decay=case.decay,
        padding_BT=case.mask(case.padding),
        device="cpu",
    )
    keys, source = tensors["keys"], tensors["source"]
    if tokens_first:
        keys = keys.transpose(0, 1).contiguous().transpose(0, 1)
        source = source.transpose(0, 1).contiguous().transpose(0, 1)
    targets = target_from_source(
        source,
        kernel_of(case, tensors),
        tensors["proj"],
        plan=plan,
        conv=case.conv,
        normalize=case.normalize,
    )
    output = fast_weight_scan(
        keys,
        _write(case, tensors, keys, targets, plan),
        tensors["weight"],
        plan=plan,
        eta=eta_of(case),
        spans=spans,
        exchange=exchange(plan.span_keeps(spans)) if exchange else None,
        carry_BDF=tensors["carry"] if case.has_carry else None,
        group_chunks=group_chunks(case, plan),
    )
    return differentiate(case, tensors, output.outputs_BTD, output.state_BDF)


def group_chunks(case: Case, plan: ChunkPlan) -> int | None:
    """Chunks of a group, another number by the seed; more than one where the keeps allow it."""
    weighs = plan.decays or case.has_factors or case.write.kind is WriteKind.bounded
    return 1 if weighs else (None, 1, 2, 3, 5)[case.seed % 5]


def _write(
    case: Case, tensors: dict[str, Tensor], keys: Tensor, targets: Tensor, plan: ChunkPlan
) -> Write:
    """What the case's rule writes, under other keys and with other factors where it has them."""
    write_keys = tensors["write_keys"] if case.has_write_keys else keys
    own = {GATE: tensors["gate"], GATE_BIAS: tensors["gate_bias"]}
    call = WriteCall(update_rule(case), plan, tensors["weight"], own)
    written = write(TokenInputs(write_keys, targets, tensors["hidden"]), targets, call)
    if case.has_factors:
        written = replace(written, factors_BN=tensors["factors"])
    return replace(written, keys_BTF=write_keys if case.has_write_keys else None)


def assert_close(
    found: Solution,
    expected: Solution,
    *,
    tolerance: float,
    least: Mapping[str, float] | None = None,
) -> None:
    """Each tensor within ``tolerance`` of its own norm, or of 0.01 (or its ``least``) if more."""
    floors = least or {}
    pairs = {
        "outputs": (found.outputs, expected.outputs),
        "state": (found.state, expected.state),
        **{f"d_{k}": (found.gradients[k], g) for k, g in expected.gradients.items()},
    }
    for name, (tensor, wanted) in pairs.items():
        error = (tensor.double() - wanted).norm()
        assert error <= tolerance * max(float(wanted.norm()), floors.get(name, 1e-2)), (
            f"{name}: {float(error):.2e} of {float(wanted.norm()):.2e}"
        )


class Collecting:
    """A pending scan of a test's exchange: starts when every summary has been handed in.

    What is not handed in stays NaN, so a scan that reads it anyway is seen.
    """

    def __init__(
        self,
        exchange: Any,
        like_SBDF: Tensor,
        direction: Direction,
        factors_SB: Tensor | None = None,
    ) -> None:
        self.exchange, self.direction, self.factors_SB = exchange, direction, factors_SB
        self.summaries_SBDF = torch.full_like(like_SBDF, torch.nan)

    def provide(self, span: int, summary_BDF: Tensor) -> None:
        self.summaries_SBDF[span] = summary_BDF

    def wait(self) -> Tensor:
        factors = {} if self.factors_SB is None else {"factors_SB": self.factors_SB}
        carries: Tensor = self.exchange.start(
            self.summaries_SBDF, direction=self.direction, **factors
        ).wait()
        return carries


class SpansInOrder:
    """A carry exchange over spans that all lie here: the scan, one span after the other."""

    def __init__(self, keeps_SB: Tensor) -> None:
        self.keeps_SB = keeps_SB

    def needs_summary(self, direction: Direction) -> list[bool]:
        last = len(self.keeps_SB) - 1 if direction is Direction.FORWARD else 0
        return [span != last for span in range(len(self.keeps_SB))]

    def share_factors(self, factors_SB: Tensor) -> Tensor:
        return factors_SB  # all spans lie here

    def open(
        self, like_SBDF: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> Collecting:
        return Collecting(self, like_SBDF, direction, factors_SB)

    def start(
        self, summaries_SBDF: Tensor, *, direction: Direction, factors_SB: Tensor | None = None
    ) -> SpansInOrder:
        keeps_SB = self.keeps_SB if factors_SB is None else self.keeps_SB * factors_SB
        spans = list(range(len(summaries_SBDF)))
        if direction is Direction.REVERSE:
            spans.reverse()
        self.carries_SBDF = torch.zeros_like(summaries_SBDF)
        for left, right in pairwise(spans):
            keep_B = keeps_SB[left].to(summaries_SBDF.dtype)[:, None, None]
            kept_BDF = torch.where(keep_B == 0, 0.0, keep_B * self.carries_SBDF[left])
            self.carries_SBDF[right] = kept_BDF + summaries_SBDF[left]
        return self

    def wait(self) -> Tensor:
        return self.carries_SBDF


@st.composite
def cases(draw: st.DrawFn, *, whole_spans: int | None = None) -> Case:
    """Any layout; with ``whole_spans`` the length is that many equal runs of whole chunks."""
    batch = draw(st.integers(1, 3))
    chunk_size = draw(st.integers(1, 7))
    if whole_spans is None:
        length = draw(st.integers(1, 24))
    else:
        length = whole_spans * chunk_size * draw(st.integers(1, 3))
    places = st.integers(0, length - 1)
    on_edges = places.map(lambda t: t - t % chunk_size)
    starts = st.lists(st.one_of(places, on_edges), max_size=4, unique=True).map(tuple)
    count = st.integers(0, length)
    padding = st.one_of(
        st.just(()),
        count.map(lambda n: tuple(range(n))),
        count.map(lambda n: tuple(range(length - n, length))),
        on_edges.map(lambda t: tuple(range(t, min(t + chunk_size, length)))),
        st.lists(places, max_size=4, unique=True).map(tuple),
    )
    rows = {"min_size": batch, "max_size": batch}
    kinds = st.sampled_from([WriteKind.plain, *WriteKind])
    write = WriteSettings(draw(kinds), draw(st.sampled_from([0.05, 0.3])))
    conv = draw(st.sampled_from([Conv.learned, *Conv]))
    off, relative, absolute = ClipMode
    clips = [Clip(relative, 0.01), Clip(relative, 0.03), Clip(absolute, 0.1)]
    return Case(
        batch=batch,
        length=length,
        chunk_size=chunk_size,
        hidden=draw(st.sampled_from([1, 4, 5])),
        ffn=draw(st.sampled_from([1, 6, 7])),
        starts=draw(st.one_of(st.just(()), st.lists(starts, **rows).map(tuple))),
        padding=draw(st.one_of(st.just(()), st.lists(padding, **rows).map(tuple))),
        decay=draw(st.sampled_from([1.0, 1.0, 0.8])),
        clip=draw(st.sampled_from([Clip(off), Clip(off), *clips])),
        conv=conv,
        kernel_size=draw(st.sampled_from([1, 3, 5, 9] if conv is Conv.learned else [1, 2, 4, 5])),
        normalize=draw(st.sampled_from(list(Normalize))),
        has_carry=draw(st.booleans()),
        has_write_keys=draw(st.booleans()),
        has_factors=write.kind is WriteKind.plain and draw(st.booleans()),
        write=write,
        uses_state=draw(st.booleans()),
        update_ratio=draw(st.sampled_from([0.05, 0.1, 0.3, 0.3, 0.0])),
        seed=draw(st.integers(0, 1000)),
    )


def documents_case(**changes: object) -> Case:
    """A packed batch with starts on and off chunk edges, padding, a carry: the usual fixed case."""
    case = Case(
        batch=2,
        length=24,
        chunk_size=4,
        starts=((0, 6, 16), (9, 11, 20)),
        padding=((22, 23), ()),
        has_carry=True,
        seed=3,
    )
    return replace(case, **changes)
