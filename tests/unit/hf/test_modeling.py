"""Whole sequences, chunked prefill and token-by-token decoding are one function (design 8.4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from megatron_ttt.hf import FastWeightCache, Qwen3TTTForCausalLM
from tests.unit.hf.models import (
    CHUNK,
    FAMILIES,
    SHAPE,
    live_model,
    relative,
    tokens,
    transcribed_logits,
)

LENGTHS = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
CASES = [(family, target) for family in FAMILIES for target in ("hidden_states", "input_embed")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@torch.no_grad()
def read_in_pieces(model: Any, ids: Tensor, pieces: list[int], mask: Tensor | None) -> Tensor:
    cache = FastWeightCache(model.config)
    logits, first = [], 0
    for piece in pieces:
        last = first + piece
        some: dict[str, Any] = {}
        if mask is not None:
            some["attention_mask"] = mask[:, :last]
            some["position_ids"] = positions(mask)[:, first:last]
        call = model(ids[:, first:last], past_key_values=cache, **some)
        logits.append(call.logits)
        first = last
    assert first == ids.shape[1]
    return torch.cat(logits, dim=1)


def positions(mask: Tensor) -> Tensor:
    """As ``generate`` numbers padded rows; angles are fp32, so an offset alone costs 1e-7."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def pieces_of(length: int, piece: int) -> list[int]:
    return [piece] * (length // piece) + ([length % piece] if length % piece else [])


@pytest.mark.parametrize(
    ("family", "target", "dtype"),
    [(*case, torch.float64) for case in CASES]
    + [("qwen3", "hidden_states", torch.float32), ("llama", "input_embed", torch.float32)],
)
def test_whole_prefill_and_decoding_agree(family: str, target: str, dtype: torch.dtype) -> None:
    model = live_model(family, dtype=dtype, ttt_target=target)
    for length in LENGTHS:
        ids = tokens(3, length, seed=length)
        whole = model(ids).logits
        for piece in (length, 1, 3, 2 * CHUNK + 3):
            found = read_in_pieces(model, ids, pieces_of(length, piece), None)
            assert relative(found, whole) < TOLERANCE[dtype], (length, piece)
    model.config.ttt_mode = False
    assert relative(model(ids).logits, whole) > 1e-2, "the fast weights changed nothing"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
def test_padding_takes_no_place(side: str, target: str) -> None:
    model = live_model(ttt_target=target)
    rows = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    longest = max(LENGTHS)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = []
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
        places.append(place)
    alone = [model(row[None]).logits[0] for row in rows]
    padded = {"whole": model(ids, attention_mask=mask, position_ids=positions(mask)).logits}
    for piece in (1, 5, CHUNK):
        padded[str(piece)] = read_in_pieces(model, ids, pieces_of(longest, piece), mask)
    for name, logits in padded.items():
        for index, place in enumerate(places):
            assert relative(logits[index, place], alone[index]) < 1e-9, (name, index)


@pytest.mark.parametrize(("family", "target"), CASES)
def test_equals_the_transcription(family: str, target: str) -> None:
    """Logits, and every gradient against autograd through the transcription."""
    model = live_model(family, ttt_target=target)
    row = tokens(1, 3 * CHUNK + 5, seed=3)[0]
    parameters = dict(model.named_parameters())
    found, wanted = model(row[None]).logits[0], transcribed_logits(model, row)
    assert relative(found, wanted) < 1e-9
    weights = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).view_as(found)
    gradients = torch.autograd.grad((found.sin() * weights).sum(), parameters.values())
    expected = torch.autograd.grad((wanted.sin() * weights).sum(), parameters.values())
    for name, one, other in zip(parameters, gradients, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6, name  # norms compute in fp32


@pytest.mark.parametrize(
    "keys",
    [
        {"ttt_decay": 0.7},
        {"ttt_clip_mode": "relative", "ttt_clip_bound": 0.04},
        {"ttt_normalize": "key_energy"},
        {"ttt_normalize": "spectral"},
        {"ttt_conv": "next_token"},
        {"ttt_conv": "causal", "ttt_kernel_size": 4},
        {"ttt_conv": "off", "ttt_normalize": "key_energy"},
        {"ttt_proj": False},
        {"ttt_write": "gated"},
        {"ttt_write": "gated", "ttt_target": "input_embed"},
        {"ttt_write": "bounded", "ttt_write_bound": 0.2},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_every_rule_decodes_as_it_trains(keys: dict[str, Any]) -> None:
    model = live_model(**keys)
    ids = tokens(2, 3 * CHUNK + 5)
    whole = model(ids).logits
    for piece in (1, 5):
        found = read_in_pieces(model, ids, pieces_of(ids.shape[1], piece), None)
        assert relative(found, whole) < 1e-9
    usual = {"ttt_decay": 1.0, "ttt_clip_mode": "off", "ttt_normalize": "none"}
    usual |= {"ttt_write": "plain", "ttt_conv": "off"}
    if keys.get("ttt_conv") == "causal":
        usual["ttt_conv"] = "learned"  # the same weights around the token
    for key, plain in usual.items():
        if keys.get(key, plain) != plain:
            setattr(model.config, key, plain)
            assert relative(model(ids).logits, whole) > 1e-6, f"{key} changed nothing"


def test_gradients_reach_every_part() -> None:
    model = live_model(ttt_target="input_embed")
    ids = tokens(2, 3 * CHUNK)
    model(ids, labels=ids).loss.backward()
    mlp = model.model.layers[0].mlp
    for weight in (mlp.ttt_conv.weight, mlp.ttt_proj.weight, mlp.down_proj.weight):
        assert weight.grad is not None and float(weight.grad.norm()) > 1e-6
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], rtol=1e-9, atol=1e-12), name


def test_gradients_of_padded_rows_are_those_of_the_rows() -> None:
    model = live_model()
    rows = [tokens(1, length, seed=length)[0] for length in (2 * CHUNK + 3, 3 * CHUNK)]
    ids = torch.zeros(2, 3 * CHUNK, dtype=torch.long)
    ids[0, CHUNK - 3 :], ids[1] = rows[0], rows[1]
    mask = (ids > 0).long()
    logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    (logits.square() * mask[..., None]).sum().backward()
    padded = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        model(row[None]).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = parameter.grad
        assert float((padded[name] - wanted).norm() / wanted.norm()) < 1e-6, name


def test_packed_documents_reset() -> None:
    """Restarting positions are documents for attention in transformers, and so for us."""
    model = live_model()
    first, second = tokens(1, 2 * CHUNK, seed=1), tokens(1, CHUNK + 4, seed=2)
    packed = model(
        torch.cat([first, second], dim=1),
        position_ids=torch.cat([torch.arange(2 * CHUNK), torch.arange(CHUNK + 4)])[None],
        use_cache=False,
    ).logits
    assert relative(packed[:, : 2 * CHUNK], model(first).logits) < 1e-9
    assert relative(packed[:, 2 * CHUNK :], model(second).logits) < 1e-9


def test_a_plain_checkpoint_starts_as_itself(tmp_path: Any) -> None:
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if not key.startswith("ttt")}
    plain = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    plain.save_pretrained(tmp_path)
    model = Qwen3TTTForCausalLM.from_pretrained(tmp_path, ttt_layers=[0, 2], ttt_chunk=CHUNK)
    ids = tokens(2, 3 * CHUNK)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    diagonals = []
    for layer in (0, 2):
        mlp = model.model.layers[layer].mlp
        assert not mlp.ttt_conv.weight.any()
        diagonal = mlp.ttt_proj.weight.diagonal()
        assert torch.equal(mlp.ttt_proj.weight, diagonal.diag())
        assert 0.05 < float(diagonal.std()) < 0.3
        diagonals.append(diagonal)
    assert not torch.equal(*diagonals), "each layer has a draw of its own"


def test_refusals() -> None:
    model = live_model()
    ids = tokens(2, 6)
    holes = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"row 1 .* padding between"):
        model(ids, attention_mask=holes)
    with pytest.raises(ValueError, match="gradients"):
        model(ids, use_cache=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match="DynamicCache cannot carry fast weights"):
            model(ids, past_key_values=DynamicCache(config=model.config))
        with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
            model(ids, attention_mask=torch.ones(2, 1, 6, 6))
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cannot crop 1 tokens"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="3 rows cannot continue a state of 2"):
            model(tokens(3, 2), past_key_values=cache)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_llama_with_a_window_is_mistral(kernel: str) -> None:
    """Window 7, not a multiple of anything; the same weights in the two families' classes."""
    llama, mistral = (
        live_model(family, sliding_window=7, attn_implementation=kernel)
        for family in ("llama", "mistral")
    )
    mistral.load_state_dict(llama.state_dict())
    mistral.config.ttt_lr = llama.config.ttt_lr
    ids, mask = tokens(2, 3 * CHUNK + 5), torch.ones(2, 3 * CHUNK + 5, dtype=torch.long)
    if kernel == "sdpa":  # eager attention of transformers gives NaN for a token that sees nothing
        mask[1, :4] = 0
    for options in ({}, {"attention_mask": mask, "position_ids": positions(mask)}):
        whole = llama(ids, **options).logits
        expected = mistral(ids, **options).logits
        assert relative(whole[mask.bool()], expected[mask.bool()]) < 1e-12
    bound = 1e-9 if kernel == "sdpa" else 1e-6  # eager attention has its softmax in fp32
    for piece in (1, 5):
        found = read_in_pieces(llama, ids, pieces_of(ids.shape[1], piece), mask)
        assert relative(found[mask.bool()], whole[mask.bool()]) < bound
    packed = torch.arange(ids.shape[1]).remainder(11)[None].expand(2, -1)
    found, expected = (model(ids, position_ids=packed).logits for model in (llama, mistral))
    assert relative(found, expected) < 1e-12
    for model in (llama, mistral):
        model.config.ttt_mode = False
    assert relative(llama(ids).logits, mistral(ids).logits) < 1e-12
    windowed = llama(ids).logits
    llama.config.sliding_window = None
    assert relative(llama(ids).logits, windowed) > 1e-3, "the window changed nothing"
