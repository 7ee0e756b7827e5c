"""Nothing leaks: changing a token changes no earlier logit, and none of another document.

Random models with live fast weights; the changed tokens stand on both sides of every kind of edge
(chunk, span, rank, document).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import Config
from megatron_ttt.data.batches import Batch
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import Normalize, TargetSource, WriteKind, WriteSettings
from megatron_ttt.scan_words import SequenceOrder
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.step import ForwardStep
from tests.distributed.training_runs import VOCABULARY, live_draw, redraw, tiny_config
from tests.distributed.training_runs import global_batch as training_batch
from tests.pool import RankPool

LENGTH = 128
STARTS = (0, 24, 41, 64, 93)  # on a chunk edge, inside a chunk, on a span edge, inside a chunk
PLACES = (0, 5, 7, 8, 9, 23, 24, 25, 31, 32, 40, 41, 42, 63, 64, 65, 92, 93, 96, 127)


def logits_of_changes(
    rank: int, ranks: int, config: Config, packed: bool, places: tuple[int, ...]
) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """This rank's token ranges and logits ``[L, V]``: unchanged, then with each place changed."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        batch = training_batch(config, 0, packed=False)
        batch = Batch(**{name: value[:1].clone() for name, value in vars(batch).items()})
        if packed:
            batch.document_starts_BT[0, list(STARTS)] = True
        step = ForwardStep(config, here, scan=trainer.scan, mode=config.ttt.mode)
        found = []
        for place in (None, *places):
            tokens = batch.tokens_BT.clone()
            if place is not None:
                tokens[0, place] = (tokens[0, place] + 1) % VOCABULARY
            layout = step.layout(batch)
            local = torch.cat([tokens[:, start:end] for start, end in layout.ranges], dim=1)
            with torch.no_grad():
                logits = trainer.stage(
                    input_ids=local,
                    position_ids=layout.positions,
                    attention_mask=None,
                    labels=None,
                    packed_seq_params=layout,
                )
            found.append(logits[0])
        return list(layout.ranges), found


def whole_logits(reports: list[Any], number: int) -> Tensor:
    whole = torch.empty(LENGTH, reports[0][1][0].shape[-1])
    for ranges, found in reports:
        offset = 0
        for start, end in ranges:
            whole[start:end] = found[number][offset : offset + end - start]
            offset += end - start
    return whole[:, :VOCABULARY]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"cp": 2}),
        (4, {"cp": 4}),
        (2, {"cp": 2, "cp_order": SequenceOrder.contiguous}),
        (
            1,
            {
                "target": TargetSource.input_embeddings,
                "normalize": Normalize.key_energy,
                "eta": 0.05,
            },
        ),
        (1, {"write": WriteSettings(WriteKind.gated)}),
        (2, {"cp": 2, "write": WriteSettings(WriteKind.bounded, 0.2)}),
    ],
    ids=["one rank", "cp 2", "cp 4", "cp 2 contiguous", "input embeddings", "gated", "bounded"],
)
def test_no_earlier_logit_changes(
    pool: RankPool, ranks: int, layout: dict[str, Any], packed: bool
) -> None:
    config = tiny_config(**layout, packed=packed, window=12)
    reports = pool.run(logits_of_changes, config, packed, PLACES, ranks=ranks, timeout=120)
    before = whole_logits(reports, 0)
    documents = torch.zeros(LENGTH, dtype=torch.int64)
    if packed:
        documents[list(STARTS[1:])] = 1
    documents = documents.cumsum(0)
    far = 0
    for number, place in enumerate(PLACES, start=1):
        change = (whole_logits(reports, number) - before).abs().amax(dim=1)
        assert not change[:place].any(), f"token {place} changed the past"
        others = change[documents != documents[place]]
        if len(others):
            assert float(others.max()) == 0.0, f"token {place} reached another document"
        assert float(change[place]) > 0.0
        # Beyond what four layers of attention can reach, only fast weights carry the news.
        beyond = change[place + 4 * 12 :]
        far += int(len(beyond) > 0 and float(beyond.max()) > 1e-5)
    if not packed:
        assert far >= 10, "fast weights carried nothing beyond the attention window"
