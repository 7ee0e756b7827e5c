"""What a layout tells those who read it: Megatron, Transformer Engine, our layers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ttt.model.sequence_layout import (
    ScanSettings,
    SequenceLayout,
    places_in_documents,
    sequence_layout,
)
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder


def layout_of(rank: int, ranks: int, order: SequenceOrder, length: int = 64) -> SequenceLayout:
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[:, 0] = True
    group: Any = SimpleNamespace(rank=rank, ranks=ranks)
    return sequence_layout(
        document_starts=starts,
        padding=torch.zeros_like(starts),
        chunk_size=None,
        decay=1.0,
        mask_attention=False,
        window=None,
        reset_positions=False,
        reset_fast_weights=False,
        scan=ScanSettings(group, order, ScanAlgorithm.auto, None),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("order", SequenceOrder)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_lengths_are_those_of_the_rank(ranks: int, order: SequenceOrder) -> None:
    """Transformer Engine multiplies ``max_seqlen_*`` by the size of its context-parallel group."""
    for rank in range(ranks):
        layout = layout_of(rank, ranks, order)
        assert layout.max_seqlen_q == layout.max_seqlen_kv == 64 // ranks
        assert sum(end - start for start, end in layout.ranges) == layout.max_seqlen_q
        assert layout.positions is not None and layout.positions.shape == (1, 64 // ranks)


def test_places_restart_at_every_document_and_count_padding() -> None:
    generator = torch.Generator().manual_seed(1)
    starts = torch.rand(20, 33, generator=generator) < 0.2
    starts[:, 0] = True
    places = places_in_documents(starts)
    for row, row_starts in enumerate(starts.tolist()):
        place = -1
        for token, begins in enumerate(row_starts):
            place = 0 if begins else place + 1
            assert int(places[row, token]) == place
