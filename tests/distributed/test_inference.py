"""A Megatron model reads in pieces what it computes whole, also on tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ttt.config.schema import Config, Toggle, TTTMode
from megatron_ttt.data.batches import Batch
from megatron_ttt.inference.model_session import LogitsOf, ModelSession
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import TargetSource, WriteKind, WriteSettings
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.step import ForwardStep
from tests.distributed.training_runs import VOCABULARY, live_draw, redraw, tiny_config
from tests.pool import RankPool

CHUNK = 8
GATED = WriteSettings(WriteKind.gated)
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
LONGEST = max(LENGTHS)


def rows_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def whole_logits(trainer: Any, config: Config, here: Ranks, mode: TTTMode) -> list[Tensor]:
    """Each row by itself through the path that trains: ``[T, W]`` a row."""
    found = []
    for row in rows_of(LENGTHS):
        shape = (1, len(row))
        starts = torch.zeros(shape, dtype=torch.bool)
        starts[0, 0] = True
        batch = Batch(
            tokens_BT=torch.tensor([row]),
            labels_BT=torch.tensor([row]),
            loss_mask_BT=torch.ones(shape, dtype=torch.bool),
            document_starts_BT=starts,
            padding_BT=torch.zeros(shape, dtype=torch.bool),
            sample_ids_B=torch.zeros(1, dtype=torch.long),
        )
        step = ForwardStep(config, here, scan=trainer.scan, mode=mode)
        layout = step.layout(batch)
        with torch.no_grad():
            logits = trainer.stage(
                input_ids=batch.tokens_BT,
                position_ids=layout.positions,
                attention_mask=None,
                labels=None,
                packed_seq_params=layout,
            )
        parts = [torch.empty_like(logits[0]) for _ in range(here.groups.tp.size())]
        torch.distributed.all_gather(parts, logits[0].contiguous(), group=here.groups.tp)
        found.append(torch.cat(parts, dim=-1)[:, :VOCABULARY])
    return found


def read_in_pieces(session: ModelSession, size: int) -> list[Tensor]:
    """All rows at once, ``size`` tokens a call; shorter rows end earlier."""
    rows = rows_of(LENGTHS)
    found: list[list[Tensor]] = [[] for _ in rows]
    for first in range(0, LONGEST, size):
        some = [row[first : first + size] for row in rows]
        logits = session.read(some, logits=LogitsOf.ALL)
        for row, tokens in enumerate(some):
            found[row].append(logits[row, : len(tokens), :VOCABULARY])
    return [torch.cat(parts) for parts in found]


def compare(rank: int, ranks: int, config: Config, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences over the largest logit, and how much fast weights matter at all."""
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        trainer.stage.to(dtype).eval()
        wanted = whole_logits(trainer, config, here, TTTMode.in_place)
        largest = max(float(logits.abs().max()) for logits in wanted)

        def session(mode: TTTMode = TTTMode.in_place) -> ModelSession:
            return ModelSession(
                trainer.stage,
                config,
                here.groups,
                scan_group=here.scan_group,
                batch=len(LENGTHS),
                device=here.device,
                mode=mode,
            )

        def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
            pairs = zip(found, wanted, strict=True)
            return max(float((one - other).abs().max()) for one, other in pairs) / largest

        report = {
            f"pieces of {size}": difference(read_in_pieces(session(), size), wanted)
            for size in (1, 5, CHUNK, LONGEST)
        }
        last = session()
        logits = last.read(rows_of(LENGTHS))[:, 0, :VOCABULARY]
        report["last"] = difference([*logits], [row[-1] for row in wanted])
        assert last.places == list(LENGTHS)
        plain = whole_logits(trainer, config, here, TTTMode.off)
        found = read_in_pieces(session(TTTMode.off), 5)
        report["off"] = difference(found, plain)
        report["fast weights"] = difference(plain, wanted)
        ratios = [
            float(
                state.update_ratios(trainer.stage.decoder.layers[layer].mlp.linear_fc2.weight)[-1]
            )
            for layer, state in last.fast_weights.items()
        ]
        report["ratio"] = max(ratios)
        return report


@pytest.mark.parametrize(
    ("ranks", "dtype", "keys"),
    [
        (1, torch.float64, {"eta": 0.01}),
        (1, torch.float64, {"eta": 0.02, "target": TargetSource.input_embeddings}),
        (1, torch.float64, {"eta": 0.01, "window": None, "tied": False}),
        (2, torch.float32, {"eta": 0.01}),
        (2, torch.float32, {"eta": 0.02, "target": TargetSource.input_embeddings}),
        (1, torch.float64, {"eta": 0.01, "write": GATED}),
        (2, torch.float32, {"eta": 0.02, "target": TargetSource.input_embeddings, "write": GATED}),
        (1, torch.float64, {"eta": 0.01, "write": WriteSettings(WriteKind.bounded, 0.2)}),
    ],
)
def test_pieces_equal_the_whole(
    pool: RankPool, ranks: int, dtype: torch.dtype, keys: dict[str, Any]
) -> None:
    config = tiny_config(tp=ranks, sequence_parallel=Toggle.off, packed=False, **keys)
    for report in pool.run(compare, config, dtype, ranks=ranks):
        assert report.pop("fast weights") > 1e-3, "the fast weights changed nothing"
        assert 0.05 < report.pop("ratio") < 0.3
        bound = 1e-9 if dtype is torch.float64 else 1e-4
        assert max(report.values()) < bound, report
