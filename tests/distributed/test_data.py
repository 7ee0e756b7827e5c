"""The data on real ranks: the cache built once, the global batch the same at every size."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.pool import RankPool
from tests.unit.data.helpers import write_dataset


def read(rank: int, ranks: int, folder: str, paths: object) -> dict[int, list[int]]:
    """Every rank a data-parallel rank; its samples by number."""
    from megatron_ttt.config.schema import Config, TokenizerKind
    from megatron_ttt.data.batches import build_data
    from megatron_ttt.data.sources import open_source

    config = Config()
    config.model.vocab_size = 258
    config.data.path, config.data.cache_dir = paths, f"{folder}/cache-{ranks}"
    config.data.tokenizer.kind, config.data.workers = TokenizerKind.bytes, 0
    config.train.seq_length, config.train.global_batch_size = 16, 8
    config.validation.interval, config.validation.batches = 5, 1
    config.data.split = "70,30,0"
    source = open_source(config.data, vocab_size=258, is_builder=rank == 0, barrier=dist.barrier)
    streams = build_data(
        config,
        source,
        dp_rank=rank,
        dp_size=ranks,
        consumed_samples=8,
        train_samples=72,
        is_builder=rank == 0,
    )
    assert streams.validation_iterator is not None
    validation = [n for b in streams.validation_iterator() for n in b.sample_ids_B.tolist()]
    assert len(validation) == 8 // ranks
    return {
        number: batch.tokens_BT[row].tolist()
        for batch in streams.train_iterator
        for row, number in enumerate(batch.sample_ids_B.tolist())
    }


@pytest.mark.parametrize("parts", [1, 2])
def test_ranks_share_the_run_between_them(pool: RankPool, tmp_path: Path, parts: int) -> None:
    prefixes = [
        write_dataset(tmp_path / str(part), [[part * 100 + d] * 6 + [256] for d in range(80)])
        for part in range(parts)
    ]
    paths = prefixes[0] if parts == 1 else prefixes
    alone = pool.run(read, str(tmp_path), paths, ranks=1)[0]
    assert sorted(alone) == list(range(8, 72))
    # what a start leaves behind that was killed while it cached the indices of two ranks' run
    pool.run(read, str(tmp_path), paths, ranks=2)
    for path in (tmp_path / "cache-2").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    found: dict[int, list[int]] = {}
    for of_rank in pool.run(read, str(tmp_path), paths, ranks=2):
        assert not set(of_rank) & set(found)
        found |= of_rank
    assert found == alone


def refuse(rank: int, ranks: int, folder: str, path: str) -> str:
    try:
        read(rank, ranks, folder, path)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_every_rank_refuses_with_the_same_words(pool: RankPool, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "huge", [[1, 5000, 256]] * 100)
    answers = pool.run(refuse, str(tmp_path), path, ranks=2)
    assert answers[0] == answers[1]
    assert "token id 5000" in answers[0]
