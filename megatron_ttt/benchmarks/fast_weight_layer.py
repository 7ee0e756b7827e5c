"""Forward and backward of a fast-weight layer: ours, the materialising one, a dense one.

``materialising`` is how the method is usually written: every chunk's summary, their cumulative sum
and one effective weight per chunk, all live at once, differentiated by autograd (batched products).
``dense`` is the plain down projection, the cost without fast weights. All three run on the same
numbers, alternating, and the first two must agree before anything is printed.

``Part.PROJECTION`` runs the down projection alone, on given keys and targets. ``Part.MLP`` runs the
whole layer: keys of a gated activation, and targets of the convolution and ``W_target`` (none of
those in the dense one).

Units: seconds, bytes. ``peak`` is what forward and backward allocate beyond their inputs; ``extra``
the part of it that the dense projection does not need as well.

Shape suffixes: T tokens, D hidden, F ffn, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ttt.benchmarks.device_counter import META, DeviceCounter, DeviceStandIns
from megatron_ttt.evaluation.memory import peak_bytes
from megatron_ttt.fast_weights import Write, fast_weight_scan
from megatron_ttt.fast_weights.documents import ChunkPlan, plan_chunks
from megatron_ttt.fast_weights.groups import group_size
from megatron_ttt.fast_weights.inside import strip_tokens
from megatron_ttt.fast_weights.target import target_from_source
from megatron_ttt.rule import KERNEL_SIZE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# Rounding between two orders of the same sums, relative to the norm of what is compared.
TOLERANCES = {"fp32": 2e-5, "bf16": 3e-2, "fp64": 1e-12}
UPDATE_RATIO = 0.2
OURS, MATERIALISING, DENSE = "fast weight", "materialising", "dense"
CHECKED_TOKENS = 2048  # where the materialising variant does not fit


class Part(StrEnum):
    """What is run."""

    PROJECTION = "projection"
    MLP = "mlp"


@dataclass(frozen=True)
class LayerProblem:
    """Sizes of one layer and how often to run it.

    Raises:
        ValueError: a size below one, tokens that the chunk does not divide (the materialising
            formulation needs whole chunks), an unknown dtype, a device that is not there.
    """

    hidden: int = 512
    ffn: int = 1536
    tokens: int = 8192
    chunk: int = 256
    dtype: str = "fp32"
    device: str = "cpu"
    repeats: int = 5
    part: str = Part.PROJECTION

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "tokens", "chunk", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.tokens % self.chunk:
            raise ValueError(f"{self.tokens} tokens are not whole chunks of {self.chunk}")
        if self.part not in list(Part):
            raise ValueError(f"part {self.part} is none of {', '.join(Part)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype} is none of {', '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device} is neither cpu nor cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda is not available here")

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk

    @property
    def group_chunks(self) -> int:
        """Chunks that touch our state together."""
        plan = _plan(self.tokens, self.chunk, torch.device("cpu"))
        is_cpu = self.device == "cpu"
        return group_size(plan, hidden=self.hidden, ffn=self.ffn, is_cpu=is_cpu, has_factors=False)

    @property
    def inside_products(self) -> float:
        """Products inside our groups, in units of tokens x hidden x ffn, forward and backward.

        Scores and their gradients, for the part of a group's square that its strips compute; a GPU
        makes the scores twice.
        """
        tokens = min(self.group_chunks * self.chunk, self.tokens)
        if tokens == self.chunk:
            return 0.0
        is_cpu = self.device == "cpu"
        strip = min(max(strip_tokens(is_cpu=is_cpu), self.chunk), tokens)
        share = (1 + strip / tokens) / 2 - self.chunk / tokens
        return share * tokens * ((3 if is_cpu else 4) / self.hidden + 3 / self.ffn)

    @property
    def matrix_bytes(self) -> int:
        return self.hidden * self.ffn * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Variant:
    """A way to compute the layer and what it must at least cost.

    ``gemms``: products of tokens x hidden x ffn, forward and backward; ours has those inside
    groups besides. ``matrix_passes``: times a hidden x ffn matrix is read or written per chunk,
    with ours per group, counted in the formulation, caches ignored.
    """

    name: str
    gemms: int
    matrix_passes: int
    forward: Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
    target: Callable[[Tensor, Tensor, Tensor, int], Tensor]

    def products(self, problem: LayerProblem) -> float:
        """Products of tokens x hidden x ffn, those of gate, up and ``W_target`` included."""
        own = self.gemms + (problem.inside_products if self.name == OURS else 0.0)
        if problem.part == Part.PROJECTION:
            return own
        target = 0 if self.name == DENSE else 3 * problem.hidden / problem.ffn
        return own + 6 + target

    def matrix_traffic(self, problem: LayerProblem) -> int:
        """Bytes of matrices read and written."""
        each = problem.group_chunks if self.name == OURS else 1
        return self.matrix_passes * -(-problem.chunks // each) * problem.matrix_bytes


@dataclass(frozen=True)
class Measurement:
    """Times of one variant, one per round, and its memory."""

    name: str
    seconds: list[float]
    floor_seconds: float
    matrix_traffic_bytes: int
    peak_bytes: int
    extra_bytes: int
    launches: int

    @property
    def best(self) -> float:
        return min(self.seconds)


@cache
def _plan(length: int, chunk: int, device: torch.device) -> ChunkPlan:
    """Lay the grid once, as training does for all layers of a micro-batch."""
    return plan_chunks(None, batch=1, length=length, chunk_size=chunk, device=device)


def _chunked_target(source_TD: Tensor, conv_D15: Tensor, proj_DD: Tensor, chunk: int) -> Tensor:
    plan = _plan(len(source_TD), chunk, source_TD.device)
    return target_from_source(source_TD[None], conv_D15, proj_DD, plan=plan)[0]


def _convolved_target(source_TD: Tensor, conv_D15: Tensor, proj_DD: Tensor, chunk: int) -> Tensor:
    """With torch's convolution over a batch of chunks, as the method is usually written."""
    source_NDC = source_TD.unflatten(0, (-1, chunk)).mT
    mixed_NDC = F.conv1d(source_NDC, conv_D15, padding=KERNEL_SIZE // 2, groups=len(conv_D15))
    return mixed_NDC.mT.flatten(0, 1) @ proj_DD


def _no_target(source_TD: Tensor, conv_D15: Tensor, proj_DD: Tensor, chunk: int) -> Tensor:
    return source_TD


def _fast_weight(
    keys_TF: Tensor, targets_TD: Tensor, weight_DF: Tensor, eta: float, chunk: int
) -> Tensor:
    plan = _plan(len(keys_TF), chunk, keys_TF.device)
    write = Write(targets_TD[None])
    return fast_weight_scan(keys_TF[None], write, weight_DF, plan=plan, eta=eta).outputs_BTD[0]


def _materialising(
    keys_TF: Tensor, targets_TD: Tensor, weight_DF: Tensor, eta: float, chunk: int
) -> Tensor:
    keys_NCF = keys_TF.unflatten(0, (-1, chunk))
    targets_NCD = targets_TD.unflatten(0, (-1, chunk))
    summaries_NDF = torch.bmm(targets_NCD[:-1].mT, keys_NCF[:-1])
    states_NDF = F.pad(summaries_NDF.cumsum(dim=0), (0, 0, 0, 0, 1, 0))
    weights_NDF = weight_DF + eta * states_NDF
    return torch.bmm(keys_NCF, weights_NDF.mT).flatten(0, 1)


def _dense(
    keys_TF: Tensor, targets_TD: Tensor, weight_DF: Tensor, eta: float, chunk: int
) -> Tensor:
    return keys_TF @ weight_DF.T


# Passes of the scan: build and read the effective weight 4 (twice), update of the state 2 (twice),
# G read by two products 2, update of G 2. Of the other: summaries written 1, cumulative sum 2,
# padding 2, times eta 2, plus W0 2, product 1; backward: product 2, sum to dW0 1, times eta 2,
# padding 2, reversed cumulative sum 6, two products 2.
VARIANTS = (
    Variant(OURS, 7, 16, forward=_fast_weight, target=_chunked_target),
    Variant(MATERIALISING, 6, 25, forward=_materialising, target=_convolved_target),
    Variant(DENSE, 3, 0, forward=_dense, target=_no_target),
)


class _Layer:
    """The numbers of one problem, and a forward and backward over them."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        generator = torch.Generator(problem.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            tensor = torch.randn(*shape, generator=generator, device=problem.device)
            return tensor.to(DTYPES[problem.dtype])

        hidden, ffn = problem.hidden, problem.ffn
        self.weight_DF = draw(hidden, ffn) / ffn**0.5
        if problem.part == Part.PROJECTION:
            self.inputs = [draw(problem.tokens, ffn), draw(problem.tokens, hidden)]
        else:
            gate_FD, up_FD = (draw(ffn, hidden) / hidden**0.5 for _ in range(2))
            conv_D15, proj_DD = draw(hidden, 1, KERNEL_SIZE), draw(hidden, hidden) / hidden**0.5
            self.inputs = [draw(problem.tokens, hidden), gate_FD, up_FD, conv_D15, proj_DD]
        self.d_outputs_TD = draw(problem.tokens, hidden)
        self.gemm_outputs_TD = torch.empty_like(self.d_outputs_TD)
        with torch.no_grad():
            self.gemm_keys_TF, targets_TD = self._keys_and_targets(VARIANTS[0])
            size = float((targets_TD.T @ self.gemm_keys_TF).float().norm())
        self.eta = UPDATE_RATIO * float(self.weight_DF.float().norm()) / size
        self.leaves = [tensor.requires_grad_() for tensor in (*self.inputs, self.weight_DF)]

    def _keys_and_targets(self, variant: Variant) -> tuple[Tensor, Tensor]:
        if self.problem.part == Part.PROJECTION:
            keys_TF, targets_TD = self.inputs
            return keys_TF, targets_TD
        source_TD, gate_FD, up_FD, conv_D15, proj_DD = self.inputs
        keys_TF = F.silu(source_TD @ gate_FD.T) * (source_TD @ up_FD.T)
        return keys_TF, variant.target(source_TD, conv_D15, proj_DD, self.problem.chunk)

    def run(self, variant: Variant) -> list[Tensor]:
        """Return outputs, and the gradients of every input and of the weight."""
        keys_TF, targets_TD = self._keys_and_targets(variant)
        chunk = self.problem.chunk
        outputs_TD = variant.forward(keys_TF, targets_TD, self.weight_DF, self.eta, chunk)
        gradients = torch.autograd.grad(
            outputs_TD, self.leaves, self.d_outputs_TD, allow_unused=variant.name == DENSE
        )
        return [outputs_TD.detach(), *gradients]

    def seconds(self, function: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, variant: Variant) -> int:
        """Return the most that one run holds beyond its inputs, results still alive included."""
        return peak_bytes(lambda: self.run(variant), torch.device(self.problem.device))

    def launches(self, variant: Variant) -> int:
        """Return the kernels that one run launches on a GPU, counted on meta tensors."""
        there = copy(self)
        there.inputs, there.weight_DF = [_on_meta(t) for t in self.inputs], _on_meta(self.weight_DF)
        there.d_outputs_TD = self.d_outputs_TD.to(META)
        there.leaves = [*there.inputs, there.weight_DF]
        with DeviceCounter(outside="layer") as counter, DeviceStandIns(counter):
            there.run(variant)
        return counter.total().kernels

    def gemm(self) -> None:
        """One product of tokens x hidden x ffn: its best time is the machine's own rate."""
        torch.mm(self.gemm_keys_TF.detach(), self.weight_DF.detach().T, out=self.gemm_outputs_TD)

    def _synchronize(self) -> None:
        if self.problem.device == "cuda":
            torch.cuda.synchronize()


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to(META).requires_grad_()


def largest_difference(layer: _Layer) -> float:
    """Largest relative difference between ours and the materialising formulation.

    Compares outputs and all gradients.

    Raises:
        RuntimeError: it is more than rounding: no speed is worth reporting.
    """
    ours, theirs = (layer.run(variant) for variant in VARIANTS[:2])
    differences = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(ours, theirs, strict=True)
    ]
    tolerance = TOLERANCES[layer.problem.dtype]
    if not max(differences) <= tolerance:
        raise RuntimeError(
            f"variants differ by {max(differences):.1e} (tolerance {tolerance:.0e}) in "
            f"outputs and gradients: {differences}"
        )
    return max(differences)


def measure(
    problem: LayerProblem, variants: Sequence[Variant] = VARIANTS
) -> tuple[list[Measurement], float]:
    """Every variant ``repeats`` times, alternating, after one unmeasured round each.

    Args:
        problem: the sizes.
        variants: without the materialising one, where it does not fit, ours is compared with it
            over ``CHECKED_TOKENS`` alone.

    Returns:
        The measurements in the order of ``variants``, and the largest relative difference.

    Raises:
        RuntimeError: the variants do not compute the same.
    """
    layer = _Layer(problem)
    fits = any(variant.name == MATERIALISING for variant in variants)
    tokens = max(CHECKED_TOKENS, problem.chunk)
    difference = largest_difference(layer if fits else _Layer(replace(problem, tokens=tokens)))
    layer.run(variants[-1])
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    gemm_seconds = []
    for _ in range(problem.repeats):
        for variant in variants:
            seconds[variant.name].append(layer.seconds(partial(layer.run, variant)))
        gemm_seconds.append(layer.seconds(layer.gemm))
    peaks = {variant.name: layer.peak_bytes(variant) for variant in variants}
    return [
        Measurement(
            name=variant.name,
            seconds=seconds[variant.name],
            floor_seconds=variant.products(problem) * min(gemm_seconds),
            matrix_traffic_bytes=variant.matrix_traffic(problem),
            peak_bytes=peaks[variant.name],
            extra_bytes=peaks[variant.name] - peaks[DENSE],
            launches=layer.launches(variant),
        )
        for variant in variants
    ], difference
