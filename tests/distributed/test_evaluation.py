"""Losses by position: the layout that computes them does not show, and decoding agrees."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import Config, Toggle, TTTMode
from megatron_ttt.conversion.opened import Checkpoint
from megatron_ttt.evaluation import losses as measured
from megatron_ttt.evaluation.documents import TextRows
from megatron_ttt.evaluation.losses import measure_losses
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.inference.model_session import LogitsOf
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import TargetSource
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from tests.distributed.training_runs import VOCABULARY, live_draw, redraw, tiny_config
from tests.pool import RankPool

LENGTH = 64
ROWS = 5  # no multiple of the data-parallel ranks, nor of the batch


def text() -> TextRows:
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return TextRows(tokens, eod=VOCABULARY - 1, pad=None)


def config_of(**layout: int) -> Config:
    return tiny_config(
        target=TargetSource.input_embeddings,
        sequence_parallel=Toggle.off,
        packed=False,
        eta=0.02,
        **layout,
    )


def losses_of(rank: int, ranks: int, config: Config) -> dict[str, Tensor]:
    """Losses ``[N, T]`` of both readings, and of the same rows read token by token."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        source = Checkpoint(Path("none"), "tiny", None, None, config.model, config.ttt, {})
        modes = [TTTMode.in_place, TTTMode.off]
        subject = Subject(source, config, here, trainer.stage.eval(), modes, None, seed=1)
        found = {}
        assert subject.new_session(TTTMode.in_place, batch=1)._scan.group.group is here.scan_group
        for mode in modes:
            with mock.patch.object(
                measured, "scan_settings", wraps=measured.scan_settings
            ) as settings:
                losses = measure_losses(subject, text(), mode=mode, batch_size=2)
            assert settings.call_args.args[1] is here.scan_group  # states have their own
            assert torch.equal(losses.count_NP, torch.ones(ROWS, LENGTH, dtype=torch.float64))
            found[mode.value] = losses.total_NP
        if here.world_size == 1:
            found["session"] = session_losses(subject)
        return found


def session_losses(subject: Subject) -> Tensor:
    """The same through the inference path, an independent one, in uneven pieces."""
    session = subject.new_session(TTTMode.in_place, batch=ROWS)
    tokens = text().tokens_NR
    pieces = [
        session.read(tokens[:, first : min(first + 13, LENGTH)].tolist(), logits=LogitsOf.ALL)
        for first in range(0, LENGTH, 13)
    ]
    logits = torch.cat(pieces, dim=1)[..., :VOCABULARY].double()
    labels = tokens[:, 1:]
    return -logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]


@pytest.fixture(scope="module")
def one_rank(pool: RankPool) -> dict[str, Tensor]:
    return pool.run(losses_of, config_of(), ranks=1)[0]


def test_losses_are_those_of_decoding_and_fast_weights_matter(one_rank: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one_rank["in_place"], one_rank["session"], rtol=1e-4, atol=1e-4)
    first_chunk = slice(0, 8)
    torch.testing.assert_close(
        one_rank["in_place"][:, first_chunk], one_rank["off"][:, first_chunk]
    )
    assert (one_rank["in_place"] - one_rank["off"])[:, 8:].abs().mean() > 0.01


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, {"tp": 2}), (2, {"cp": 2}), (2, {}), (4, {"cp": 2})]
)
def test_every_layout_gives_the_same(
    pool: RankPool, one_rank: dict[str, Tensor], ranks: int, layout: dict[str, int]
) -> None:
    for found in pool.run(losses_of, config_of(**layout), ranks=ranks):
        for reading in ("in_place", "off"):
            torch.testing.assert_close(found[reading], one_rank[reading], rtol=1e-4, atol=1e-4)
