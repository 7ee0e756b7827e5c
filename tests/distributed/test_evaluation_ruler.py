"""Samples asked of a live model: every layout gives the same, and the whole sequence agrees."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import Config, Toggle, TTTMode
from megatron_ttt.conversion.opened import Checkpoint
from megatron_ttt.data.tokenizers import load_tokenizer
from megatron_ttt.evaluation.asking import Answered, Item, ask
from megatron_ttt.evaluation.documents import TextRows
from megatron_ttt.evaluation.losses import measure_losses
from megatron_ttt.evaluation.ruler.haystack import Haystack
from megatron_ttt.evaluation.ruler.sample import RulerTask, make_sample, sample_rng
from megatron_ttt.evaluation.schema import EvaluationConfig
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.evaluation.tasks import needles, ruler
from megatron_ttt.inference.generation import generate
from megatron_ttt.inference.sampling import Sampler, Sampling
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.loop import build_trainer
from tests.distributed.training_runs import live_draw, redraw, tiny_config
from tests.pool import RankPool

VOCABULARY = 259  # bytes and their marks, and no multiple of any tp
MODES = [TTTMode.in_place, TTTMode.off]
# Five samples of two lengths: neither batches nor ranks come out even.
ITEMS = [
    Item(RulerTask.niah_single, 330, 0),
    Item(RulerTask.niah_multikey, 480, 0),
    Item(RulerTask.niah_single, 480, 0, 0.5),
    Item(RulerTask.niah_single, 480, 1),
    Item(RulerTask.niah_multikey, 480, 1),
]
SEED = 9


def config_of(*, vocabulary: int = VOCABULARY, **layout: int) -> Config:
    config = tiny_config(
        sequence_parallel=Toggle.off, packed=False, tied=False, eta=0.001, **layout
    )
    return replace(config, model=replace(config.model, vocab_size=vocabulary, max_positions=512))


def live_subject(config: Config, here: Ranks) -> Subject:
    trainer = build_trainer(config, here)
    redraw(trainer, live_draw)
    source = Checkpoint(Path("none"), "tiny", None, None, config.model, config.ttt, {})
    model = trainer.stage.eval()
    return Subject(source, config, here, model, MODES, load_tokenizer("bytes"), seed=SEED)


def ask_live(rank: int, ranks: int, config: Config) -> list[Answered]:
    with megatron_on_cpu(), model_parallel(config) as here:
        subject = live_subject(config, here)
        return ask(subject, ITEMS, haystack=Haystack.noise(), batch_size=2, key="lengths")


def ask_otherwise(rank: int, ranks: int, config: Config) -> list[dict[TTTMode, tuple[float, str]]]:
    """Loss of the answer from one forward of everything, and decoding from a fresh session."""
    tokenizer = load_tokenizer("bytes")
    with megatron_on_cpu(), model_parallel(config) as here:
        subject = live_subject(config, here)
        found = []
        for item in ITEMS:
            sample = make_sample(
                item.task,
                tokenizer=tokenizer,
                length=item.length,
                rng=sample_rng(SEED, item.task, item.length, item.number),
                haystack=Haystack.noise(),
                depth=item.depth,
            )
            found.append({})
            for mode in MODES:
                loss = whole_sequence_loss(subject, mode, sample.prompt_ids, sample.answer_ids)
                session = subject.new_session(mode, batch=1)
                written = generate(
                    session,
                    [sample.prompt_ids],
                    sampler=Sampler(Sampling()),
                    max_new_tokens=sample.new_tokens,
                    stop_tokens={tokenizer.eod},
                )
                found[-1][mode] = (loss, tokenizer.decode(written.tokens[0]))
                for layer, state in session.fast_weights.items():
                    weight = subject.model.decoder.layers[layer].mlp.linear_fc2.weight.detach()
                    assert 0.03 < float(state.update_ratios(weight)[-1]) < 0.3
        return found


def whole_sequence_loss(
    subject: Subject, mode: TTTMode, prompt: list[int], answer: list[int]
) -> float:
    """Through the path that trains, which knows no session."""
    row = TextRows(torch.tensor([prompt + answer]), eod=VOCABULARY, pad=None)
    losses = measure_losses(subject, row, mode=mode, batch_size=1).total_NP[0]
    return float(losses[len(prompt) - 1 :].mean())


@pytest.fixture(scope="module")
def one_rank(pool: RankPool) -> list[Answered]:
    return pool.run(ask_live, config_of(), ranks=1)[0]


def test_losses_and_outputs_are_those_of_other_paths(
    pool: RankPool, one_rank: list[Answered]
) -> None:
    (otherwise,) = pool.run(ask_otherwise, config_of(), ranks=1)
    assert [answered.item for answered in one_rank] == ITEMS
    for answered, wanted in zip(one_rank, otherwise, strict=True):
        for mode in MODES:
            loss, output = wanted[mode]
            assert answered.replies[mode].answer_loss == pytest.approx(loss, rel=1e-4)
            assert answered.replies[mode].output == output != ""
        on, off = (answered.replies[mode] for mode in MODES)
        assert abs(on.answer_loss - off.answer_loss) > 1e-3 * off.answer_loss
        assert on.output != off.output and len(set(on.output)) > 3  # decoding went somewhere


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, {"tp": 2}), (2, {"cp": 2}), (2, {}), (4, {"cp": 2})]
)
def test_every_layout_gives_the_same(
    pool: RankPool, one_rank: list[Answered], ranks: int, layout: dict[str, int]
) -> None:
    for found in pool.run(ask_live, config_of(**layout), ranks=ranks):
        for answered, wanted in zip(found, one_rank, strict=True):
            assert answered.item == wanted.item and answered.answers == wanted.answers
            for mode in MODES:
                reply, expected = answered.replies[mode], wanted.replies[mode]
                assert reply.answer_loss == pytest.approx(expected.answer_loss, rel=1e-4)
                assert reply.output == expected.output and reply.score == expected.score


def reports(rank: int, ranks: int, config: Config) -> list[dict[str, Any]]:
    """What both tasks write; their pictures are drawn."""
    kinds = [RulerTask.niah_single, RulerTask.niah_multivalue]
    asked = ruler.RulerConfig(tasks=kinds, lengths=[500, 480], samples=1)
    hidden = needles.NeedlesConfig(lengths=[400], depths=3, samples=1, batch_size=3)
    with megatron_on_cpu(), model_parallel(config) as here:
        subject = live_subject(config, here)
        found = []
        for report in (
            ruler.run(subject, asked, EvaluationConfig()),
            needles.run(subject, hidden, EvaluationConfig()),
        ):
            assert report.draw is not None and report.draw().axes
            assert all(len(row) == len(t.columns) for t in report.tables for row in t.rows)
            found.append(report.values)
        return found


def test_reports_sum_up_their_samples(pool: RankPool) -> None:
    ((ruler, needles),) = pool.run(reports, config_of(), ranks=1)
    cells = {(cell["task"], cell["length"]): cell for cell in ruler["cells"]}
    assert list(cells)[:2] == [("all tasks", 480), ("all tasks", 500)] and len(cells) == 6
    for length in (480, 500):
        losses = [
            one["in_place"]["answer_loss"] for one in ruler["results"] if one["length"] == length
        ]
        found = cells["all tasks", length]["in_place"]["answer_loss"]
        assert len(losses) == 2 and found == pytest.approx(sum(losses) / 2)
    assert [cell["depth"] for cell in needles["cells"]] == [0, 0.5, 1]
    assert len({tuple(one["answers"]) for one in needles["results"]}) == 1
    assert len({one["in_place"]["answer_loss"] for one in needles["results"]}) == 3


@pytest.mark.parametrize(
    ("items", "vocabulary", "line"),
    [
        (
            [Item(RulerTask.niah_single, 330, 0), Item(RulerTask.niah_multiquery, 330, 0)],
            VOCABULARY,
            r"^ruler.lengths=330: niah_multiquery takes about [5-9]\d\d tokens at least$",
        ),
        (ITEMS, 131, r"^data.tokenizer=bytes: has 258 tokens, and tiny knows 131$"),
    ],
)
def test_what_cannot_be_asked_takes_one_line(
    pool: RankPool, items: list[Item], vocabulary: int, line: str
) -> None:
    (message,) = pool.run(refusal, config_of(vocabulary=vocabulary), items, ranks=1)
    assert re.search(line, message)


def refusal(rank: int, ranks: int, config: Config, items: list[Item]) -> str:
    with megatron_on_cpu(), model_parallel(config) as here:
        subject = live_subject(config, here)
        with pytest.raises(ConfigError) as error:
            ask(subject, items, haystack=Haystack.noise(), batch_size=1, key="ruler.lengths")
        return str(error.value)
