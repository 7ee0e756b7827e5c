"""Reading token by token, in pieces and by whole chunks is the recurrence of ``reference.py``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_ttt.fast_weights import TokenInputs, Write, WriteCall, target_from_source, write
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.reference import reference_fast_weight, reference_target
from megatron_ttt.inference.fast_weight_state import FastWeightState, LayerTensors
from megatron_ttt.inference.token_runs import TokenRuns, runs_of_mask, whole_runs
from megatron_ttt.rule import Clip, ClipMode, Conv, Normalize, UpdateRule

C, D, F = 6, 10, 14
RULES = {
    "plain": UpdateRule(C, 0.02),
    "decay": UpdateRule(C, 0.02, decay=0.6),
    "clip": UpdateRule(C, 0.02, clip=Clip(ClipMode.relative, 0.05)),
    "key_energy": UpdateRule(C, 0.5, normalize=Normalize.key_energy),
    "spectral": UpdateRule(C, 0.5, normalize=Normalize.spectral),
    "next_token": UpdateRule(C, 0.02, conv=Conv.next_token),
    "causal": UpdateRule(C, 0.03, conv=Conv.causal),
}


@dataclass
class Layer:
    """One layer's weights and what a batch of rows brings to it."""

    keys: Tensor
    source: Tensor
    weight: Tensor
    conv: Tensor
    proj: Tensor
    rule: UpdateRule

    @property
    def kernel(self) -> Tensor | None:
        return self.conv if self.rule.conv.is_learned else None

    def make_write(self, tokens: TokenInputs, plan: ChunkPlan, rule: UpdateRule) -> Write:
        targets = target_from_source(
            tokens.source_BTH,
            self.kernel,
            self.proj,
            plan=plan,
            conv=rule.conv,
            normalize=rule.normalize,
        )
        return write(tokens, targets, WriteCall(rule, plan, self.weight, {}))

    def read(self, state: FastWeightState, tokens: slice, runs: TokenRuns) -> Tensor:
        inputs = TokenInputs(self.keys[:, tokens], self.source[:, tokens])
        return state.read(LayerTensors(inputs, self.weight, self.make_write), runs)

    def reference(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        source = self.source[row : row + 1, :length]
        targets = reference_target(
            source,
            self.kernel,
            self.proj,
            chunk_size=C,
            conv=self.rule.conv,
            normalize=self.rule.normalize,
        )
        outputs, state = reference_fast_weight(
            self.keys[row : row + 1, :length],
            targets,
            self.weight,
            eta=self.rule.eta,
            chunk_size=C,
            decay=self.rule.decay,
            clip=self.rule.clip,
            normalize=self.rule.normalize,
        )
        ratio = self.rule.eta * state.norm() / self.weight.norm()
        assert length < C or 0.03 < ratio < 0.6, float(ratio)
        return outputs[0], state[0]


def layer_of(rule: UpdateRule, *, batch: int, length: int) -> Layer:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Layer(
        draw(batch, length, F), draw(batch, length, D), draw(D, F), draw(D, 1, 5) * 0.4,
        draw(D, D) * 0.3, rule,
    )  # fmt: skip


def pieces(length: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [C - 1, C, C + 1, 3 * C + 5])
def test_any_pieces_equal_the_reference(name: str, length: int) -> None:
    layer = layer_of(RULES[name], batch=2, length=length)
    for size in (1, 2, C - 1, C, C + 1, length):
        state = FastWeightState(layer.rule, batch=2)
        found = torch.cat(
            [
                layer.read(state, some, whole_runs(2, some.stop - some.start))
                for some in pieces(length, size)
            ],
            dim=1,
        )
        for row in range(2):
            outputs, fast = layer.reference(row, length)
            assert torch.allclose(found[row], outputs, rtol=1e-10, atol=1e-12), size
            if length >= C:
                assert state.state_BDF is not None
                assert torch.allclose(state.state_BDF[row], fast, rtol=1e-10, atol=1e-12)
        assert state.places == [length] * 2 and state.pending == [length % C] * 2


def test_rows_complete_chunks_at_different_steps() -> None:
    """Every row pauses on its own pattern of steps, one token or four tokens at a time."""
    length = 4 * C + 3
    layer = layer_of(RULES["decay"], batch=3, length=length)
    counts = [length, 2 * C + 1, C - 2]
    for size in (1, 4):
        state = FastWeightState(layer.rule, batch=3)
        done = [0, 0, 0]
        outputs: list[list[Tensor]] = [[], [], []]
        for step in itertools.count():
            takes = [
                0 if (step + row) % (row + 2) == 0 else min(size, count - place)
                for row, (count, place) in enumerate(zip(counts, done, strict=True))
            ]
            # Rows hold their tokens at the end of the call, padding before them.
            index = torch.zeros(3, size, dtype=torch.long)
            for row, take in enumerate(takes):
                index[row, size - take :] = torch.arange(done[row], done[row] + take)
            rows = torch.arange(3)[:, None]
            tokens = TokenInputs(layer.keys[rows, index], layer.source[rows, index])
            call = LayerTensors(tokens, layer.weight, layer.make_write)
            runs = TokenRuns(tuple(size - take for take in takes), tuple(takes), size)
            found = state.read(call, runs)
            for row, take in enumerate(takes):
                outputs[row].append(found[row, size - take :])
                done[row] += take
            if done == counts:
                break
        assert state.places == counts
        for row, count in enumerate(counts):
            wanted, fast = layer.reference(row, count)
            assert torch.allclose(torch.cat(outputs[row]), wanted, rtol=1e-10, atol=1e-12)
            assert state.state_BDF is not None
            assert torch.allclose(state.state_BDF[row], fast, rtol=1e-10, atol=1e-12)


def test_flush_writes_the_unfinished_chunk() -> None:
    length = C + 4
    layer = layer_of(RULES["decay"], batch=1, length=length)
    state = FastWeightState(layer.rule, batch=1)
    layer.read(state, slice(0, length), whole_runs(1, length))
    state.flush(layer.weight, layer.make_write)
    targets = reference_target(layer.source, layer.conv, layer.proj, chunk_size=C)
    _, first = layer.reference(0, C)
    rest = torch.einsum("td,tf->df", targets[0, C:], layer.keys[0, C:])
    assert state.state_BDF is not None
    assert torch.allclose(state.state_BDF[0], 0.6 * first + rest, rtol=1e-10, atol=1e-12)
    assert state.pending == [0] and state.places == [length]


def test_rows_move_with_everything_they_hold() -> None:
    length = 2 * C + 3
    layer = layer_of(RULES["plain"], batch=2, length=length + C)
    state = FastWeightState(layer.rule, batch=2)
    layer.read(state, slice(0, length), whole_runs(2, length))
    state.repeat(2)
    state.select([3, 0, 2])
    rows = [1, 0, 1]
    moved = Layer(
        layer.keys[rows], layer.source[rows], layer.weight, layer.conv, layer.proj, layer.rule
    )
    found = moved.read(state, slice(length, length + C), whole_runs(3, C))
    for place, row in enumerate(rows):
        wanted, _ = layer.reference(row, length + C)
        assert torch.allclose(found[place], wanted[length:], rtol=1e-10, atol=1e-12)


def test_low_precision_decodes_as_it_prefills() -> None:
    """The effective weight is rounded as training rounds it: bfloat16 outputs are equal bits."""
    length = 3 * C
    layer = layer_of(UpdateRule(C, 0.02), batch=1, length=length)
    for name in ("keys", "source", "weight", "conv", "proj"):
        setattr(layer, name, getattr(layer, name).bfloat16())
    whole, split = (FastWeightState(layer.rule, batch=1) for _ in range(2))
    layer.read(whole, slice(0, length), whole_runs(1, length))
    for some in pieces(length, C - 1):
        layer.read(split, some, whole_runs(1, some.stop - some.start))
    assert whole.state_BDF is not None and split.state_BDF is not None
    assert whole.state_BDF.dtype == torch.float32
    assert torch.equal(whole.state_BDF, split.state_BDF)


def test_masks() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    runs = runs_of_mask(mask)
    assert runs == TokenRuns((2, 0, 0, 0), (2, 4, 1, 0), 4)
    with pytest.raises(ValueError, match=r"row 0 .* 2 real tokens spread over \[1, 4\)"):
        runs_of_mask(torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="1 rows cannot continue a state of 2"):
        state = FastWeightState(RULES["plain"], batch=2)
        layer = layer_of(RULES["plain"], batch=1, length=2)
        layer.read(state, slice(0, 2), whole_runs(1, 2))
