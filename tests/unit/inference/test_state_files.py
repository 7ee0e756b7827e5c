"""Sessions and memories: continued bit-equally, refused by name, never damaged silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ttt.hf import FastWeightCache
from megatron_ttt.hf.sessions import (
    load_memory,
    load_session,
    model_identity,
    save_memory,
    save_session,
)
from megatron_ttt.inference.fast_weight_state import Unfinished
from megatron_ttt.inference.state_files import StateFileError, StateKind, load_state
from tests.unit.hf.models import CHUNK, live_model, relative, tokens


def read(model, ids, cache=None):  # type: ignore[no-untyped-def]
    cache = cache or FastWeightCache(model.config)
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits, cache


def test_a_session_continues_bit_equally(tmp_path: Path) -> None:
    model = live_model(dtype=torch.float32)
    ids, more = tokens(2, 2 * CHUNK + 3), tokens(2, CHUNK, seed=3)
    _, cache = read(model, ids)
    identity = model_identity(model)
    path = tmp_path / "some" / "talk.session"
    save_session(path, cache, identity, tensors={"tokens": ids}, extra={"turn": 1})
    wanted, _ = read(model, more, cache)

    again = live_model(dtype=torch.float32)
    loaded, tensors, extra = load_session(path, again, model_identity(again))
    assert torch.equal(tensors["tokens"], ids) and extra == {"turn": 1}
    found, _ = read(again, more, loaded)
    assert torch.equal(found, wanted)
    assert [child.name for child in path.parent.iterdir()] == ["talk.session"]


@pytest.mark.parametrize("rest", list(Unfinished))
def test_a_memory_starts_a_fresh_context(rest: Unfinished, tmp_path: Path) -> None:
    model = live_model()
    length = 2 * CHUNK + 3
    _, cache = read(model, tokens(1, length))
    identity = model_identity(model)
    path = tmp_path / "book.memory"
    save_memory(path, model, cache, identity, rest=rest)
    remembered = load_memory(path, model, identity, batch=2)
    assert remembered.get_seq_length() == 0
    question = tokens(2, CHUNK + 2, seed=4)
    found, _ = read(model, question, remembered)

    # The same state put by hand under a fresh cache, with the unfinished chunk written or not.
    _, other = read(model, tokens(1, length))
    fresh = FastWeightCache(model.config)
    for layer, state in other.fast_weights.items():
        if rest is Unfinished.FLUSH:
            mlp = model.model.layers[layer].mlp
            state.flush(mlp.down_proj.weight, mlp.make_write)
        assert state.state_BDF is not None
        fresh.state_of(layer, batch=2).restore(
            places=[0, 0],
            pending=[0, 0],
            state_BDF=state.state_BDF.repeat(2, 1, 1),
            unfinished=None,
        )
    wanted, _ = read(model, question, fresh)
    assert torch.equal(found, wanted)
    without, _ = read(model, question)
    assert relative(found, without) > 1e-2, "the memory changed nothing"


def test_nothing_to_remember(tmp_path: Path) -> None:
    model = live_model()
    _, cache = read(model, tokens(1, CHUNK - 1))
    with pytest.raises(StateFileError, match=f"has not completed a chunk of {CHUNK} tokens"):
        save_memory(tmp_path / "m", model, cache, model_identity(model), rest=Unfinished.DROP)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model = live_model()
    _, cache = read(model, tokens(1, CHUNK))
    identity = model_identity(model)
    path = tmp_path / "m"
    save_memory(path, model, cache, identity, rest=Unfinished.DROP)
    cases = {
        "chunk_size 8, here 16": replace(identity, chunk_size=16),
        f"eta {identity.eta}, here 3.0": replace(identity, eta=3.0),
        r"layers \(0, 2\), here \(0,\)": replace(identity, layers=(0,)),
        "decay 1.0, here 0.5": replace(identity, decay=0.5),
        "clip off, here relative 0.1": replace(identity, clip="relative 0.1"),
        "normalize none, here key_energy": replace(identity, normalize="key_energy"),
    }
    for message, other in cases.items():
        with pytest.raises(StateFileError, match=message):
            load_memory(path, model, other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    with pytest.raises(StateFileError, match=r"belongs to another model: other weights$"):
        load_memory(path, model, model_identity(model))
    with pytest.raises(StateFileError, match="a memory, where a session is needed"):
        load_session(path, model, identity)


def test_damage_is_found(tmp_path: Path) -> None:
    model = live_model(dtype=torch.float32)
    _, cache = read(model, tokens(1, CHUNK + 1))
    identity = model_identity(model)
    path = tmp_path / "talk.session"
    save_session(path, cache, identity)
    whole = path.read_bytes()

    def message(content: bytes | None) -> str:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StateFileError) as error:
            load_session(path, model, identity)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    flipped = bytearray(whole)
    flipped[-5] ^= 16
    assert "do not match their checksum" in message(bytes(flipped))
    assert "not a readable state file" in message(whole[: len(whole) // 2])
    assert "not a readable state file" in message(b"")
    assert "not a readable state file" in message(b"hello" * 100)
    assert "no such file" in message(None)
    path.write_bytes(b"x")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(StateFileError, match="not a state file of megatron_ttt"):
        load_session(path, model, identity)
    save_file({"a": torch.zeros(1)}, path, metadata={"megatron_ttt": json.dumps({"format": "9"})})
    with pytest.raises(StateFileError, match="format '9'"):
        load_state(path, StateKind.SESSION, identity)
    blocked = tmp_path / "a file"
    blocked.write_text("")
    with pytest.raises(StateFileError, match="cannot be written"):
        save_session(blocked / "x", cache, identity)
