"""Sessions and memories of Megatron models on tensor-parallel ranks; the tool on an import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import CommPrecision, Config, Toggle
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.inference import model_session
from megatron_ttt.inference.backend import Turn
from megatron_ttt.inference.fast_weight_state import Unfinished
from megatron_ttt.inference.generation import generate
from megatron_ttt.inference.megatron_backend import MegatronBackend
from megatron_ttt.inference.model_session import LogitsOf, ModelSession
from megatron_ttt.inference.sampling import Sampler, Sampling
from megatron_ttt.inference.state_files import StateFileError
from megatron_ttt.model.build import build_model
from megatron_ttt.model.initialize import initialize
from megatron_ttt.parallel.cost import CPU_MACHINE, save_topology
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import TargetSource
from megatron_ttt.scan_words import SequenceOrder
from megatron_ttt.training.distributed import Ranks, model_parallel
from tests.distributed.training_runs import VOCABULARY, live_draw, tiny_config
from tests.pool import RankPool

CHUNK = 8
NEW = 2 * CHUNK + 3
PROMPTS = [list(range(1, 3 * CHUNK + 6)), [5, 9, 2]]


def backend_of(config: Config, here: Ranks) -> MegatronBackend:
    transformer = transformer_config(config, device_is_cuda=False)
    model = build_model(config, transformer, here.groups).eval()
    tp = here.groups.tp
    initialize(
        model,
        seed=config.train.seed,
        vocab_size=VOCABULARY,
        tp_rank=tp.rank(),
        tp_size=tp.size(),
        draw=live_draw,
    )
    backend = MegatronBackend(model, config, here, mode=config.ttt.mode, tokenizer=None)
    assert backend.new_reader(1)._scan.group.group is here.scan_group  # apart from attention's
    return backend


def sampler() -> Sampler:
    return Sampler(Sampling(temperature=0.8, top_k=20, seed=7))


def tell(rank: int, ranks: int, config: Config, folder: Path) -> dict[str, Any]:
    """Straight generation, the same in two sessions, and what a memory makes of a question."""
    with megatron_on_cpu(), model_parallel(config) as here:
        backend = backend_of(config, here)
        straight = generate(backend.new_reader(2), PROMPTS, sampler=sampler(), max_new_tokens=NEW)
        reader, drawn = backend.new_reader(2), sampler()
        first = generate(reader, PROMPTS, sampler=drawn, max_new_tokens=7)
        backend.save_session(folder / "talk", reader, Turn.after(first.unread, drawn))

        again = backend_of(config, here)
        reader, turn = again.load_session(folder / "talk")
        drawn = Sampler(Sampling(temperature=0.8, top_k=20, seed=99))
        drawn.generator.set_state(turn.generator)
        rest = generate(reader, turn.unread, sampler=drawn, max_new_tokens=NEW - 7)

        book = backend.new_reader(1)
        book.read_last([PROMPTS[0]])
        backend.save_memory(folder / "book", book, Unfinished.FLUSH)
        remembering = again.load_memory(folder / "book", 1)
        return {
            "straight": straight.tokens,
            "in two": [one + two for one, two in zip(first.tokens, rest.tokens, strict=True)],
            "with memory": question(remembering),
            "by hand": question(by_hand(backend, book)),
            "without": question(backend.new_reader(1)),
        }


def question(reader: ModelSession) -> Tensor:
    return reader.read([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]], logits=LogitsOf.ALL)[0, :, :VOCABULARY]


def by_hand(backend: MegatronBackend, book: ModelSession) -> ModelSession:
    """A fresh context under the states that a book left behind."""
    fresh = backend.new_reader(1)
    for layer, state in fresh.fast_weights.items():
        left = book.fast_weights[layer].state_BDF
        state.restore(places=[0], pending=[0], state_BDF=left, unfinished=None)
    return fresh


def test_sessions_and_memories(pool: RankPool, tmp_path: Path) -> None:
    reports = {}
    for tp in (1, 2):
        config = tiny_config(tp=tp, sequence_parallel=Toggle.off, packed=False, eta=0.01)
        folder = tmp_path / str(tp)
        reports[tp] = pool.run(tell, config, folder, ranks=tp)
        for report in reports[tp]:
            assert report["straight"] == report["in two"]
            assert torch.equal(report["with memory"], report["by hand"])
            largest = report["without"].abs().max()
            assert float((report["with memory"] - report["without"]).abs().max()) > 1e-3 * largest
    one, two = reports[1][0], reports[2][0]
    assert one["straight"] == two["straight"]
    largest = one["with memory"].abs().max()
    assert float((one["with memory"] - two["with memory"]).abs().max()) < 1e-4 * largest
    assert sorted(file.name for file in (tmp_path / "2").iterdir()) == [
        "book.tp0", "book.tp1", "talk.tp0", "talk.tp1",
    ]  # fmt: skip


def refuse(rank: int, ranks: int, config: Config, folder: Path) -> list[str]:
    """What loading says when something is not as it was."""
    said = []
    with megatron_on_cpu(), model_parallel(config) as here:
        backend = backend_of(config, here)
        reader = backend.new_reader(1)
        reader.read_last([PROMPTS[0]])
        backend.save_session(folder / "talk", reader, Turn.after([[1]], sampler()))
        with torch.no_grad():
            backend.model.decoder.layers[1].mlp.linear_fc1.weight[0, 0] += 1
        config.ttt.eta *= 2
        with pytest.raises(StateFileError) as error:
            backend_of(config, here).load_session(folder / "talk")
        said.append(str(error.value))
        backend.identity = backend_of(config, here).identity
        with pytest.raises(StateFileError) as error:
            backend.load_memory(folder / "talk", 1)
        said.append(str(error.value))
    for split in (tiny_config(pp=2, sequence_parallel=Toggle.off), tiny_config(tp=2)):
        with megatron_on_cpu(), model_parallel(split) as here:
            with pytest.raises(ValueError) as fault:
                backend_of(split, here).new_reader(1)
            said.append(str(fault.value))
    return said


def test_refusals(pool: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tp=2, sequence_parallel=Toggle.off, packed=False, eta=0.01)
    for said in pool.run(refuse, config, tmp_path, ranks=2):
        assert "belongs to another model" in said[0] and "eta 0.01, here 0.02" in said[0]
        assert "a session, where a memory is needed" in said[1]
        assert "needs pp=1" in said[2] and "sequence_parallel=on" in said[3]


LONG = (75, 41)  # at cp = 2, zigzag: one call of 32 tokens dealt to the ranks, or two of 16


def read_long(rank: int, ranks: int, config: Config) -> dict[str, Any]:
    """Logits after long prompts and a few more tokens, and what is then held."""
    with megatron_on_cpu(), model_parallel(config) as here, short_calls():
        session = backend_of(config, here).new_reader(2)
        rows = [[(7 * t + row) % VOCABULARY for t in range(LONG[row])] for row in range(2)]
        calls: list[int] = []
        original = session._read_split

        def counted(rows: Any) -> None:
            calls.append(len(rows[0]))
            original(rows)

        session._read_split = counted
        logits = [session.read_last(rows)]
        logits += [session.read_last([[t], [t + 1] if t % 3 else []]) for t in range(CHUNK + 2)]
        logits.append(session.read_last(rows))  # a second long turn, from unfinished chunks
        ratios = [
            float(state.update_ratios(session.model.decoder.layers[layer].mlp.linear_fc2.weight)[0])
            for layer, state in session.fast_weights.items()
        ]
        return {
            "logits": torch.stack([step[0] for step in logits]),
            "places": session.places,
            "calls": calls,
            "ratios": ratios,
            "topology": session._scan.group.topology,
        }


def test_a_session_scans_as_the_configuration_says(pool: RankPool, tmp_path: Path) -> None:
    """Rounded messages change the logits a little; measured constants reach the scan."""
    constants = tmp_path / "constants.json"
    save_topology(CPU_MACHINE, constants)
    keys = {"sequence_parallel": Toggle.off, "packed": False, "eta": 0.003, "cp": 2}
    plain = pool.run(read_long, tiny_config(**keys), ranks=2)[0]
    rounded = {"scan_precision": CommPrecision.bf16, "scan_constants": str(constants)}
    found = pool.run(read_long, tiny_config(**keys, **rounded), ranks=2)[0]
    assert plain["calls"] == found["calls"] == [32]
    difference = float((found["logits"] - plain["logits"]).abs().max())
    assert 1e-5 < difference / float(plain["logits"].abs().max()) < 1e-2
    assert (plain["topology"], found["topology"]) == (None, CPU_MACHINE)


@contextmanager
def short_calls() -> Iterator[None]:
    """Prompts are read 8 tokens a rank at a time, so that states are carried between calls."""
    kept, model_session.PREFILL_TOKENS = model_session.PREFILL_TOKENS, 8
    try:
        yield
    finally:
        model_session.PREFILL_TOKENS = kept


@pytest.mark.parametrize(
    ("ranks", "layout", "calls"),
    [
        (2, {"cp": 2}, [32]),
        (2, {"cp": 2, "cp_order": SequenceOrder.contiguous}, [16, 16]),
        (4, {"cp": 2, "tp": 2, "cp_order": SequenceOrder.contiguous}, [16, 16]),
    ],
)
@pytest.mark.parametrize("target", list(TargetSource), ids=lambda target: target.value)
def test_long_prompts_are_dealt_to_context_parallel_ranks(
    pool: RankPool, target: TargetSource, ranks: int, layout: dict[str, Any], calls: list[int]
) -> None:
    eta = 0.003 if target is TargetSource.hidden_states else 0.005
    keys = {"sequence_parallel": Toggle.off, "packed": False, "eta": eta, "target": target}
    wanted = pool.run(read_long, tiny_config(**keys), ranks=1)[0]
    assert wanted["calls"] == [] and 0.05 < max(wanted["ratios"]) < 0.3, wanted["ratios"]
    largest = float(wanted["logits"].abs().max())
    for found in pool.run(read_long, tiny_config(**layout, **keys), ranks=ranks):
        assert found["calls"] == calls and found["places"] == wanted["places"]
        assert float((found["logits"] - wanted["logits"]).abs().max()) < 1e-4 * largest


def test_the_tool_reads_imported_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exported model and its import say the same, under their own rule and a changed one."""
    from tests.unit.hf.models import live_model
    from tools import convert_checkpoint
    from tools import generate as generate_tool

    live_model(dtype=torch.float32, vocab_size=258).save_pretrained(tmp_path / "exported")
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "imported")
    assert convert_checkpoint.main(["import", f"checkpoint={exported}", f"output={imported}"]) == 0
    capsys.readouterr()
    options = ["tokenizer=bytes", "max_new_tokens=20", "prompt=A long enough prompt"]

    def say(model: str, *more: str) -> str:
        assert generate_tool.main([f"checkpoint={model}", *options, "prompt=b", *more]) == 0
        return capsys.readouterr().out

    changed = ("ttt.chunk_size=5", "ttt.decay=0.6", "ttt.clip.mode=relative", "ttt.clip.bound=0.05")
    texts = [say(exported), say(exported, *changed), say(imported, "ttt=off")]
    assert [say(imported), say(imported, *changed)] == texts[:2]
    assert len(set(texts)) == 3
    assert generate_tool.main([f"checkpoint={imported}", *options, "ttt.clip.bound=0.1"]) == 2
    assert "the checkpoint has ttt.clip.mode=off" in capsys.readouterr().err
