"""``generate()`` carries the fast weights: batches, padding, beams, stop tokens, more turns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_ttt.hf import FastWeightCache
from tests.unit.hf.models import CHUNK, SHAPE, live_model, relative, tokens

NEW = CHUNK + 5  # so that generated tokens complete a chunk
PROMPTS = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = tokens(1, length, seed=length)[0]
    return ids, (ids > 0).long()


@torch.no_grad()
def greedy_by_whole_sequences(model: Any, row: Tensor, count: int) -> Tensor:
    for _ in range(count):
        row = torch.cat([row, model(row[None]).logits[0, -1:].argmax(dim=-1)])
    return row[-count:]


@pytest.mark.parametrize(
    ("family", "target"), [("qwen3", "hidden_states"), ("llama", "input_embed")]
)
def test_greedy_is_the_whole_sequence_argmax(family: str, target: str) -> None:
    model = live_model(family, ttt_target=target)
    ids, mask = left_padded(PROMPTS)
    for options in ({}, {"prefill_chunk_size": CHUNK + 3}, {"use_cache": False}):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
        )
        for row, length in enumerate(PROMPTS):
            wanted = greedy_by_whole_sequences(model, ids[row, -length:], NEW)
            assert out[row, -NEW:].tolist() == wanted.tolist(), (options, row)
    model.config.ttt_mode = False
    off = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert off.tolist() != out.tolist(), "the fast weights changed nothing"


def test_beams_reorder_the_fast_weights() -> None:
    """Against beam search that reads every sequence anew at each step."""
    model = live_model()
    moved: list[list[int]] = []
    reorder = FastWeightCache.reorder_cache

    class Watched(FastWeightCache):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            moved.append(beam_idx.tolist())
            reorder(self, beam_idx)

    ids, mask = left_padded([CHUNK - 2, 2 * CHUNK + 1])
    options = {"num_beams": 5, "max_new_tokens": 4 * CHUNK, "attention_mask": mask}
    cached = model.generate(ids, past_key_values=Watched(model.config), **options)
    anew = model.generate(ids, use_cache=False, **options)
    assert cached.tolist() == anew.tolist()
    assert any(rows != sorted(rows) or len(set(rows)) < len(rows) for rows in moved)


def test_reordered_rows_take_their_fast_weights_along() -> None:
    model = live_model()
    ids, more = tokens(3, 2 * CHUNK + 3, seed=1), tokens(3, CHUNK, seed=2)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(order)
        found = torch.cat(
            [model(more[:, t : t + 1], past_key_values=cache).logits for t in range(CHUNK)], dim=1
        )
        wanted = model(torch.cat([ids[order], more], dim=1)).logits[:, 2 * CHUNK + 3 :]
    assert relative(found, wanted) < 1e-9


def test_sampling_of_several_sequences() -> None:
    model = live_model()
    ids = tokens(2, CHUNK + 3)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": NEW, "top_k": 20}
    torch.manual_seed(4)
    cached = model.generate(ids, **options)
    torch.manual_seed(4)
    anew = model.generate(ids, use_cache=False, **options)
    assert cached.shape == (4, CHUNK + 3 + NEW)
    assert cached.tolist() == anew.tolist()


def test_rows_past_their_stop_token_no_longer_write() -> None:
    model = live_model()
    ids, mask = left_padded([CHUNK - 1, CHUNK - 1])
    ids[1] = tokens(1, CHUNK - 1, seed=9)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    generated = free[:, CHUNK - 1 :].tolist()
    # A token that row 0 generates early and row 1 never: row 0 stops there, row 1 goes on.
    stop, when = next((t, i) for i, t in enumerate(generated[0][:4]) if t not in generated[1])
    cache = FastWeightCache(model.config)
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stop,
        past_key_values=cache,
    )
    # The last generated token of a row is never fed; a stop token is, while others go on.
    wanted_places = [CHUNK - 1 + when + 1, CHUNK - 1 + NEW - 1]
    for layer, state in cache.fast_weights.items():
        assert state.places == wanted_places, layer
    alone = FastWeightCache(model.config)
    with torch.no_grad():
        model(free[:1, : wanted_places[0]], past_key_values=alone)
    for layer, state in alone.fast_weights.items():
        found = cache.fast_weights[layer]
        assert found.pending[0] == state.pending[0]
        assert state.state_BDF is not None and found.state_BDF is not None
        assert torch.allclose(found.state_BDF[0], state.state_BDF[0], rtol=1e-9)
        assert not torch.allclose(found.state_BDF[1], state.state_BDF[0])


def test_a_second_turn_continues() -> None:
    model = live_model()
    ids, more = tokens(2, CHUNK + 2, seed=1), tokens(2, 5, seed=2)
    cache = FastWeightCache(model.config)
    options = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(ids, past_key_values=cache, **options)
    both = torch.cat([first, more], dim=1)
    remembered = copy.deepcopy(cache)
    continued = model.generate(both, past_key_values=cache, **options)
    assert continued.tolist() == model.generate(both, **options).tolist()
    again = model.generate(both, past_key_values=remembered, **options)
    assert again.tolist() == continued.tolist(), "a copied cache is a branch of its own"


def test_rows_repeat_and_select() -> None:
    model = live_model()
    ids, more = tokens(2, 2 * CHUNK + 3, seed=1), tokens(4, CHUNK, seed=2)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 2, 1]))
        found = model(more, past_key_values=cache).logits
        rows = torch.cat([ids[[1, 0, 1, 0]], more], dim=1)
        wanted = model(rows).logits[:, 2 * CHUNK + 3 :]
    assert relative(found, wanted) < 1e-9


def test_without_fast_weights_it_is_the_plain_model(tmp_path: Any) -> None:
    model = live_model(dtype=torch.float32)
    model.config.ttt_mode = False
    shape = {key: value for key, value in SHAPE.items() if not key.startswith("ttt")}
    plain = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids, mask = left_padded(PROMPTS)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    assert model.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()


def test_what_cannot_work_is_refused() -> None:
    model = live_model(dtype=torch.float32)
    ids = tokens(1, CHUNK + 1)
    with pytest.raises(ValueError, match="cache_implementation='static' cannot carry"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(ids, max_new_tokens=2, assistant_model=live_model(dtype=torch.float32))
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=3)
