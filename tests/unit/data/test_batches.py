"""The order of a run's samples: whole, the same for every layout, and the same after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ttt.config.schema import Config, DataSource, TokenizerKind
from megatron_ttt.data.batches import Batch, DataStreams, MicroBatchSampler, build_data
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.data.preprocessing import PreprocessOptions, preprocess
from megatron_ttt.data.sources import open_source
from tests.unit.data.helpers import make_text, write_dataset

SEQ = 16


def numbered_documents(count: int, *, base: int = 0, length: int = 5) -> list[list[int]]:
    """Documents whose tokens say which document they are of: [d, d, d, d, 256]."""
    return [[base + d] * (length - 1) + [256] for d in range(count)]


def config(tmp_path: Path, path: Any, **data: Any) -> Config:
    made = Config()
    made.model.vocab_size = 258
    made.data.path = path
    made.data.split = "80,20,0"
    made.data.cache_dir = str(tmp_path / "cache")
    made.data.tokenizer.kind = TokenizerKind.bytes
    made.data.workers = 0
    made.train.seq_length = SEQ
    made.train.global_batch_size = 8
    made.train.micro_batch_size = 2
    for name, value in data.items():
        setattr(made.data, name, value)
    return made


def build(made: Config, **numbers: int) -> DataStreams:
    given = {"dp_rank": 0, "dp_size": 1, "consumed_samples": 0, "train_samples": 40} | numbers
    source = open_source(
        made.data, vocab_size=made.model.vocab_size, is_builder=True, barrier=lambda: None
    )
    return build_data(made, source, is_builder=True, **given)


def texts(batches: Any) -> dict[int, list[int]]:
    """Sample number -> its tokens and the label after them."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        assert isinstance(batch, Batch)
        for row, number in enumerate(batch.sample_ids_B.tolist()):
            assert number not in found
            found[number] = [*batch.tokens_BT[row].tolist(), int(batch.labels_BT[row, -1])]
    return found


def test_blocks_of_a_global_batch() -> None:
    def numbers(rank: int, size: int, micro: int) -> list[list[int]]:
        options = {"start": 8, "stop": 24, "micro_batch_size": micro}
        return list(MicroBatchSampler(dp_rank=rank, dp_size=size, **options))

    assert numbers(0, 1, 4) == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22, 23],
    ]
    assert numbers(0, 2, 2) == [[8, 9], [12, 13], [16, 17], [20, 21]]
    assert numbers(1, 2, 2) == [[10, 11], [14, 15], [18, 19], [22, 23]]
    assert len(MicroBatchSampler(start=8, stop=24, micro_batch_size=2, dp_rank=0, dp_size=2)) == 4


@pytest.mark.parametrize("consumed", [0, 16, 32])
@pytest.mark.parametrize(("size", "micro"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_every_layout_sees_each_sample_once(size: int, micro: int, consumed: int) -> None:
    for step in range(consumed, 40, 8):  # within every global batch, not only over the run
        seen = [
            number
            for rank in range(size)
            for block in MicroBatchSampler(
                start=step, stop=step + 8, micro_batch_size=micro, dp_rank=rank, dp_size=size
            )
            for number in block
        ]
        assert sorted(seen) == list(range(step, step + 8))


def test_numbers_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"10 samples \(0 to 10\).*of 2 on 4 data-parallel ranks"):
        MicroBatchSampler(start=0, stop=10, micro_batch_size=2, dp_rank=0, dp_size=4)
    with pytest.raises(ValueError, match="samples 8 to 0: the run is already past its end"):
        MicroBatchSampler(start=8, stop=0, micro_batch_size=1, dp_rank=0, dp_size=1)


def test_a_resumed_run_repeats_and_loses_nothing(tmp_path: Path) -> None:
    """17 steps at dp 1; 7 at dp 1, 4 at dp 4 and micro-batch 1, the rest at dp 2: three epochs."""
    prefix = write_dataset(tmp_path / "d", numbered_documents(200))
    made = config(tmp_path, prefix)
    straight = build(made, train_samples=136)
    assert straight.train_samples_per_epoch == 49
    whole = texts(straight.train_iterator)
    assert sorted(whole) == list(range(136))
    made.train.micro_batch_size = 1
    parts = [(0, 56, 1, 2), (56, 88, 4, 1), (88, 136, 2, 2)]
    resumed: dict[int, list[int]] = {}
    for first, last, size, micro in parts:
        made.train.micro_batch_size = micro
        for rank in range(size):
            streams = build(
                made, consumed_samples=first, train_samples=136, dp_rank=rank, dp_size=size
            )
            steps = (last - first) // 8 * (8 // micro // size)
            resumed |= texts(next(streams.train_iterator) for _ in range(steps))
    assert resumed == whole


def test_a_longer_run_begins_with_the_shorter(tmp_path: Path) -> None:
    prefixes = [
        write_dataset(tmp_path / "d", numbered_documents(90)),
        write_dataset(tmp_path / "e", numbered_documents(60, base=100)),
    ]
    for path in (prefixes[0], prefixes):
        made = config(tmp_path, path)
        short = texts(build(made, train_samples=64).train_iterator)
        long = texts(build(made, train_samples=256).train_iterator)
        assert {number: long[number] for number in short} == short


def test_epochs_hold_the_same_samples_in_other_orders(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", numbered_documents(200))
    made = config(tmp_path, prefix)
    made.train.global_batch_size = made.train.micro_batch_size = 1
    found = texts(build(made, train_samples=3 * 49).train_iterator)
    epochs = [[found[e * 49 + i] for i in range(49)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    # one epoch covers the training split once: its 160 documents without the unused tail
    tokens = sorted(token for text in epochs[0] for token in text[:-1] if token != 256)
    assert len(tokens) >= 160 * 4 - SEQ
    assert all(tokens.count(document) <= 4 for document in range(160))
    assert max(tokens) < 160


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", numbered_documents(200))
    made = config(tmp_path, prefix)
    one = texts(build(made).train_iterator)
    assert texts(build(made).train_iterator) == one
    made.train.seed = 7
    assert texts(build(made).train_iterator) != one


def test_splits_share_no_document_and_validation_starts_again(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", numbered_documents(250))
    made = config(tmp_path, prefix)
    made.validation.interval, made.validation.batches = 5, 1
    streams = build(made, train_samples=56)
    assert streams.validation_iterator is not None
    first = texts(streams.validation_iterator())
    assert sorted(first) == list(range(8))
    next(streams.validation_iterator())  # left unfinished
    assert texts(streams.validation_iterator()) == first
    trained = {token for text in texts(streams.train_iterator).values() for token in text}
    validated = {token for text in first.values() for token in text}
    assert trained & validated == {256}
    assert build(config(tmp_path, prefix)).validation_iterator is None


def test_a_short_validation_split_warns(tmp_path: Path) -> None:
    made = config(tmp_path, write_dataset(tmp_path / "d", numbered_documents(200)))
    made.validation.interval, made.validation.batches = 5, 2
    with pytest.warns(UserWarning, match="holds 12 samples, fewer than the 16 of"):
        streams = build(made)
    assert streams.validation_iterator is not None
    assert sorted(texts(streams.validation_iterator())) == list(range(16))


def test_blending_follows_the_weights(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "one", numbered_documents(200))
    two = write_dataset(tmp_path / "two", numbered_documents(50, base=200))

    def share_of_two(path: Any) -> float:
        found = texts(build(config(tmp_path, path), train_samples=160).train_iterator)
        return sum(1 for text in found.values() if set(text) & set(range(200, 250))) / 160

    assert share_of_two({one: 3, two: 1}) == pytest.approx(0.25, abs=0.01)
    assert share_of_two({one: 0.1, two: 0.9}) == pytest.approx(0.9, abs=0.01)
    assert share_of_two([one, two]) == pytest.approx(0.2, abs=0.01)  # by tokens: 1000 and 250


def test_workers_read_the_same(tmp_path: Path) -> None:
    made = config(tmp_path, write_dataset(tmp_path / "d", numbered_documents(200)))
    made.validation.interval, made.validation.batches = 5, 1
    alone = build(made)
    made.data.workers = 2
    before = torch.random.get_rng_state()
    together = build(made)
    assert texts(together.train_iterator) == texts(alone.train_iterator)
    assert together.validation_iterator is not None and alone.validation_iterator is not None
    assert texts(together.validation_iterator()) == texts(alone.validation_iterator())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_aligned_documents_start_on_the_grid_of_every_row(tmp_path: Path) -> None:
    """Packed rows of aligned documents: with them packed and one-by-one training are the same."""
    lines = [make_text(i, 1 + i % 3).replace("\n", " ") for i in range(120)]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    output = str(tmp_path / "aligned")
    preprocess(
        PreprocessOptions(
            inputs=(str(tmp_path / "x.txt"),), output=output, format=InputFormat.lines, align=8
        )
    )
    made = config(tmp_path, output)
    made.train.seq_length = 64
    batches = list(build(made, train_samples=32).train_iterator)
    starts = torch.cat([batch.document_starts_BT for batch in batches])
    padding = torch.cat([batch.padding_BT for batch in batches])
    assert starts.any(dim=0)[8:].any()
    assert not starts[:, torch.arange(64) % 8 != 0].any()
    assert padding.any()


def test_stale_indices_are_not_used(tmp_path: Path) -> None:
    """Data prepared again under the same name, other lengths: its own cached indices."""
    prefix = write_dataset(tmp_path / "d", numbered_documents(200))
    made = config(tmp_path, prefix)
    build(made)
    write_dataset(tmp_path / "d", numbered_documents(40, length=25))
    found = texts(build(made).train_iterator)
    assert max(token for text in found.values() for token in text if token != 256) < 32


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("kept", [0, 100, -1])
def test_damaged_cached_indices_are_built_again(tmp_path: Path, name: str, kept: int) -> None:
    """A start killed while it wrote them must not break every later one."""
    made = config(tmp_path, write_dataset(tmp_path / "d", numbered_documents(200)))
    before = texts(build(made).train_iterator)
    (path,) = (tmp_path / "cache").glob(f"*{name}.npy")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=f"{name}.npy is damaged"):
        again = build(made)
    assert texts(again.train_iterator) == before


def test_the_standard_library(tmp_path: Path) -> None:
    made = config(tmp_path, None, source=DataSource.python_stdlib, split="99,1,0")
    made.train.seq_length = 1024
    streams = build(made, train_samples=8)
    batch = next(streams.train_iterator)
    assert batch.tokens_BT.shape == (2, 1024)
    assert (streams.tokenizer.eod, streams.tokenizer.pad, streams.tokenizer.vocab_size) == (
        256,
        257,
        258,
    )
    assert streams.train_samples_per_epoch > 5000


def broken(tmp_path: Path, name: str) -> tuple[Config, str]:
    """A configuration with one fault, and the words its error must have."""
    good = write_dataset(tmp_path / "good", numbered_documents(200))
    huge = write_dataset(tmp_path / "huge", [[1, 5000, 256]] * 100)
    short = write_dataset(tmp_path / "short", [[1, 2, 256]] * 3)
    cut = write_dataset(tmp_path / "cut", numbered_documents(20))
    (tmp_path / "cut.bin").write_bytes(b"x")
    faults: dict[str, tuple[Any, dict[str, Any], str]] = {
        "none": (None, {}, r"data.path=None: give the prefix"),
        "empty list": ([], {}, r"data.path=\[\]"),
        "missing": (str(tmp_path / "nothing"), {}, r"nothing.idx does not exist"),
        "damaged": (cut, {}, r"cut.bin has 1 bytes"),
        "one of two": ([good, cut], {}, r"cut.bin has 1 bytes"),
        "twice": ([good, good], {}, "names .* twice"),
        "weight": ({good: 0}, {}, "the weight 0, no positive number"),
        "weight text": ({good: "1"}, {}, "the weight '1', no positive number"),
        "vocabulary": (huge, {}, r"token id 5000, beyond .*model.vocab_size=258"),
        "short": (
            short,
            {},
            r"the train split .* has 6 tokens in 2 of 3 documents, fewer than one",
        ),
        "split": (good, {"split": "much"}, r"data.split='much': give the shares"),
        "split 0": (good, {"split": "0,0,0"}, r"data.split='0,0,0'"),
        "no training": (good, {"split": "0,100,0"}, r"the train split .* has 0 tokens"),
    }
    path, data, message = faults[name]
    return config(tmp_path, path, **data), message


@pytest.mark.parametrize(
    "name",
    [
        *("none", "empty list", "missing", "damaged", "one of two", "twice", "weight"),
        *("weight text", "vocabulary", "short", "split", "split 0", "no training"),
    ],
)
def test_faults_take_one_line(tmp_path: Path, name: str) -> None:
    made, message = broken(tmp_path, name)
    with pytest.raises(ValueError, match=message) as raised:
        build(made)
    assert "\n" not in str(raised.value)


def test_validation_without_documents(tmp_path: Path) -> None:
    made = config(tmp_path, write_dataset(tmp_path / "d", numbered_documents(200)), split="100,0,0")
    build(made)
    made.validation.interval = 5
    with pytest.raises(ValueError, match=r"the valid split .* has 0 tokens in 0 of 200"):
        build(made)


def test_tokenizers_have_to_agree(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text, long enough for a row of sixteen tokens " * 9)
    output = str(tmp_path / "out")
    preprocess(PreprocessOptions(inputs=(str(tmp_path / "x.txt"),), output=output))
    made = config(tmp_path, output, split="1,0,0")
    assert build(made, train_samples=8).tokenizer.eod == 256
    made.data.tokenizer.kind = TokenizerKind.huggingface  # unnamed: the sidecar knows better
    assert build(made, train_samples=8).tokenizer.eod == 256
    made.data.tokenizer.name = "some/model"
    with pytest.raises(ValueError, match=r"kind=huggingface, but .* was made with bytes"):
        build(made)
    bare = write_dataset(tmp_path / "bare", numbered_documents(200))
    made = config(tmp_path, bare)
    made.data.tokenizer.kind = TokenizerKind.huggingface
    with pytest.raises(
        ValueError, match=r"bare.meta.json does not exist, so data.tokenizer has to"
    ):
        build(made)
