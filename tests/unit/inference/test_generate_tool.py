"""``tools/generate.py`` from its command line: text, sessions, memories, mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.hf import FastWeightCache
from megatron_ttt.inference.backend import Turn
from megatron_ttt.inference.generation import Generated
from megatron_ttt.inference.generation import generate as generate_tokens
from megatron_ttt.inference.sampling import Sampler, Sampling
from megatron_ttt.inference.transformers_backend import TransformersBackend
from tests.unit.hf.models import CHUNK, live_model
from tools.generate import main

PROMPT = "A book that is longer than three chunks."
NEW = 2 * CHUNK + 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A live model over bytes, and the folder it is exported to."""
    made = live_model(dtype=torch.float32, vocab_size=258)
    folder = tmp_path_factory.mktemp("model") / "exported"
    made.save_pretrained(folder)
    return made, str(folder)


@pytest.fixture
def generate(model: tuple[Any, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str, new: int = NEW, status: int = 0) -> str:
        """Standard output of a success, the one line of a mistake."""
        words = [f"checkpoint={model[1]}", "tokenizer=bytes", f"max_new_tokens={new}", *arguments]
        assert main(words) == status
        captured = capsys.readouterr()
        if status == 0:
            assert "tokens/s" in captured.err
            return captured.out
        lines = [line for line in captured.err.splitlines() if "Loading weights" not in line]
        said = [line for line in lines if line.strip()]
        assert len(said) == 1 and captured.out == ""
        return said[0]

    return call


def text_of(model: Any, prompt: str, new: int) -> str:
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=256)
    new_ids = [int(token) for token in out[0, ids.shape[1] :] if token < 256]
    return bytes(new_ids).decode("utf-8", errors="replace")


def test_greedy_text_is_that_of_transformers(
    model: tuple[Any, str], generate: Callable[..., str]
) -> None:
    wanted = text_of(model[0], PROMPT, NEW)
    assert generate(f"prompt={PROMPT}") == wanted + "\n"
    assert generate(f"prompt={PROMPT}", f"checkpoint=hf:{model[1]}") == wanted + "\n"
    assert generate(f"prompt={PROMPT}", "ttt=off") != wanted + "\n"
    both = generate(f"prompt={PROMPT}", "prompt=short")
    assert both == f"--- 0\n{wanted}\n--- 1\n{text_of(model[0], 'short', NEW)}\n"


@pytest.mark.parametrize(
    ("name", "words", "keys"),
    [
        ("eta", ("ttt.eta=0.002",), {"ttt_lr": 0.002}),
        ("chunk_size", ("ttt.chunk_size=5",), {"ttt_chunk": 5}),
        ("decay", ("ttt.decay=0.5",), {"ttt_decay": 0.5}),
        (
            "clip",
            ("ttt.clip.mode=relative", "ttt.clip.bound=0.02"),
            {"ttt_clip_mode": "relative", "ttt_clip_bound": 0.02},
        ),
    ],
    ids=["eta", "chunk_size", "decay", "clip"],
)
def test_a_changed_rule_is_that_of_a_model_configured_so(
    name: str,
    words: tuple[str, ...],
    keys: dict[str, Any],
    model: tuple[Any, str],
    generate: Callable[..., str],
    tmp_path: Path,
) -> None:
    configured = copy.deepcopy(model[0])
    for key, value in keys.items():
        setattr(configured.config, key, value)
    said = generate(f"prompt={PROMPT}", *words, f"session={tmp_path / 'talk'}")
    assert said == text_of(configured, PROMPT, NEW) + "\n"
    assert said != generate(f"prompt={PROMPT}")
    refused = generate("prompt=x", f"session={tmp_path / 'talk'}", status=2)
    assert f"belongs to another model: {name} " in refused


def test_sampling_follows_its_seed(generate: Callable[..., str]) -> None:
    options = (f"prompt={PROMPT}", "temperature=1.5", "top_k=50", "top_p=0.9")
    one = generate(*options, "seed=1")
    assert one == generate(*options, "seed=1")
    assert one != generate(*options, "seed=2")


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_session_goes_on_where_it_stopped(
    temperature: float, model: tuple[Any, str], tmp_path: Path
) -> None:
    """Token by token; rows of different lengths, one of which stops early."""
    prompts = [list(PROMPT.encode()), list(b"short")]

    def turn(reader: Any, rows: list[list[int]], sampler: Sampler, new: int) -> Generated:
        return generate_tokens(
            reader, rows, sampler=sampler, max_new_tokens=new, stop_tokens={stop_token}
        )

    def sampler_of() -> Sampler:
        return Sampler(Sampling(temperature=temperature, seed=3))

    stop_token = -1
    backend = TransformersBackend(Path(model[1]))
    free = turn(backend.new_reader(2), prompts, sampler_of(), NEW + 9)
    stop_token = next(t for t in free.tokens[1][3:] if t not in free.tokens[0])
    straight = turn(backend.new_reader(2), prompts, sampler_of(), NEW + 9)
    assert straight.stopped == [False, True] and len(straight.tokens[1]) < NEW

    reader, sampler = backend.new_reader(2), sampler_of()
    first = turn(reader, prompts, sampler, 3)
    path = tmp_path / "talk"
    backend.save_session(path, reader, Turn.after(first.unread, sampler))
    again = TransformersBackend(Path(model[1]))
    reader, restored = again.load_session(path)
    sampler = Sampler(Sampling(temperature=temperature, seed=99))
    sampler.generator.set_state(restored.generator)
    rest = turn(reader, restored.unread, sampler, NEW + 6)
    assert [one + two for one, two in zip(first.tokens, rest.tokens, strict=True)] == (
        straight.tokens
    )


def test_the_command_line_continues_a_session(generate: Callable[..., str], tmp_path: Path) -> None:
    session = (f"session={tmp_path / 'talk'}",)
    generate(f"prompt={PROMPT}", *session)
    size = (tmp_path / "talk").stat().st_size
    continued = generate("prompt=And then?", *session)
    assert continued != generate("prompt=And then?")
    assert (tmp_path / "talk").stat().st_size > size
    assert "has 1 rows, not 2" in generate("prompt=a", "prompt=b", *session, status=2)


def test_a_memory_is_used(
    model: tuple[Any, str], generate: Callable[..., str], tmp_path: Path
) -> None:
    book, memory = tmp_path / "book.txt", str(tmp_path / "book.memory")
    book.write_text("The captain of the ship is called Ada. " * 2)
    generate(f"read={book}", f"save_memory={memory}", new=0)
    question = "Who is the captain?"
    remembered = generate(f"prompt={question}", f"memory={memory}")
    assert remembered != generate(f"prompt={question}")
    cache = FastWeightCache(model[0].config)
    with torch.no_grad():
        model[0](torch.tensor([list(book.read_bytes())]), past_key_values=cache)
    fresh = FastWeightCache(model[0].config)
    for layer, state in cache.fast_weights.items():
        mlp = model[0].model.layers[layer].mlp
        state.flush(mlp.down_proj.weight, mlp.make_write)
        fresh.state_of(layer, batch=1).restore(
            places=[0], pending=[0], state_BDF=state.state_BDF, unfinished=None
        )
    ids = torch.tensor([list(question.encode())])
    out = model[0].generate(ids, past_key_values=fresh, max_new_tokens=NEW, do_sample=False)
    wanted = bytes(out[0, ids.shape[1] :].clamp(max=255).tolist()).decode(errors="replace")
    assert remembered == wanted + "\n"


def test_mistakes_take_one_line_and_exit_2(
    model: tuple[Any, str], generate: Callable[..., str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no state")
    cases = {
        ("prompt=",): "the prompt is empty",
        (f"prompt={'x' * 300}",): "the model has 256 positions",
        ("prompt=x", f"session={broken}"): "not a readable state file",
        ("prompt=x", f"memory={tmp_path / 'none'}"): "no such file",
        ("prompt=x", f"session={broken}", "ttt=off"): "they are off here",
        ("prompt=x", "top_p=2"): "top_p=2.0: must lie in (0, 1]",
        (f"prompt_file={tmp_path / 'none'}",): "cannot be read",
        ("prompt=x", "ttt=on"): "ttt.mode=on: must be one of both, in_place, off",
        ("prompt=x", "ttt.eta=much"): "ttt.eta=much: must be a number",
        ("prompt=x", "ttt.eta=nan"): "ttt.eta=nan: must be a number of at least 0",
        ("prompt=x", "ttt.chunk_size=0"): "ttt.chunk_size=0: must be at least 1",
        ("prompt=x", "ttt.decay=1.5"): "ttt.decay=1.5: must lie in (0, 1]",
        ("prompt=x", "ttt.clip.mode=soft"): "must be one of off, relative, absolute",
        ("prompt=x", "ttt.clip.bound=0.1"): "the checkpoint has ttt.clip.mode=off",
        ("prompt=x", "ttt.normalize=none"): "ttt.normalize=none: no such key",
        ("prompt=x", "parallel.tp=2"): "an exported model is read by one process",
    }
    for arguments, message in cases.items():
        assert message in generate(*arguments, status=2), arguments
    assert generate(f"prompt={'x' * 300}", "beyond_positions=true", new=2)
    assert main([f"checkpoint={tmp_path}", "prompt=x"]) == 2
    assert main([f"checkpoint={model[1]}", "seed=many"]) == 2


def test_options_with_dashes_still_work(
    model: tuple[Any, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokenizer", "bytes", "--max-new-tokens=5", "--beyond-positions", "allow"]
    assert main([model[1], "--prompt", PROMPT, "--prompt", "short", *words]) == 0
    captured = capsys.readouterr()
    wanted = [text_of(model[0], prompt, 5) for prompt in (PROMPT, "short")]
    assert captured.out == f"--- 0\n{wanted[0]}\n--- 1\n{wanted[1]}\n"
    (line,) = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert "prompt=short tokenizer=bytes max_new_tokens=5 beyond_positions=true" in line
