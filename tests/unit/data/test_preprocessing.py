"""A job's result: what was written, whoever wrote it, however often it was stopped."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ttt.config.schema import Bos
from megatron_ttt.data.checks import check_indexed_dataset
from megatron_ttt.data.indexed import bin_path, idx_path, sidecar_path
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.data.preprocessing import PreprocessOptions, Progress, preprocess
from megatron_ttt.data.shards import OnError
from megatron_ttt.data.tokenizers import HuggingFaceTokenizer
from megatron_ttt.files import replacing
from tests.unit.data.helpers import make_text, save_tokenizer, store_truncation

TEXTS = [make_text(i, 3 + i % 9) for i in range(60)]


def as_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def options(tmp_path: Path, *inputs: Path, **changes: object) -> PreprocessOptions:
    plain = PreprocessOptions(inputs=tuple(map(str, inputs)), output=str(tmp_path / "out"))
    return replace(plain, **changes)  # type: ignore[arg-type]


def outputs(prefix: str) -> list[bytes]:
    return [path(prefix).read_bytes() for path in (bin_path, idx_path, sidecar_path)]


def read_back(prefix: str) -> list[list[int]]:
    check_indexed_dataset(prefix)
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_every_format_reads_back_equal(tmp_path: Path) -> None:
    expected = [[*text.encode(), 256] for text in TEXTS]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    table = pa.table({"content": TEXTS})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    jobs = {
        "text": options(tmp_path, folder, output=str(tmp_path / "text")),
        "jsonl": options(tmp_path, as_jsonl(tmp_path / "x.jsonl"), output=str(tmp_path / "jsonl")),
        "parquet": options(
            tmp_path, tmp_path / "x.parquet", column="content", output=str(tmp_path / "parquet")
        ),
    }
    for job in jobs.values():
        preprocess(replace(job, shard_bytes=500))
        assert read_back(job.output) == expected
    one_line = [text.replace("\n", " ") for text in TEXTS]
    (tmp_path / "lines.txt").write_text("\n".join(one_line))
    job = options(tmp_path, tmp_path / "lines.txt", format=InputFormat.lines)
    preprocess(job)
    assert read_back(job.output) == [[*text.encode(), 256] for text in one_line]


def test_several_inputs_keep_their_order(tmp_path: Path) -> None:
    b, a = as_jsonl(tmp_path / "b.jsonl", TEXTS[:5]), as_jsonl(tmp_path / "a.jsonl", TEXTS[5:9])
    preprocess(options(tmp_path, b, a))
    assert read_back(str(tmp_path / "out")) == [[*text.encode(), 256] for text in TEXTS[:9]]


def test_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "tokenizer")
    path = as_jsonl(tmp_path / "x.jsonl")
    job = options(tmp_path, path, tokenizer_kind="huggingface", tokenizer_name=name)
    summary = preprocess(job)
    tokenizer = HuggingFaceTokenizer(name)
    assert read_back(job.output) == [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]
    assert summary.sidecar.tokenizer == tokenizer.identity
    facts = check_indexed_dataset(job.output)
    assert facts.sidecar == summary.sidecar


@pytest.mark.parametrize("bos", Bos)
def test_documents_begin_as_the_tokenizer_or_the_option_says(tmp_path: Path, bos: Bos) -> None:
    name = save_tokenizer(tmp_path / "t", template="<|begin|> $A", bos_token="<|begin|>")
    path = as_jsonl(tmp_path / "x.jsonl")
    job = options(tmp_path, path, tokenizer_kind="huggingface", tokenizer_name=name, bos=bos)
    summary = preprocess(replace(job, align=8, pad_id=1))
    encode, start = HuggingFaceTokenizer(name).encode, [] if bos is Bos.none else [2]
    ids = [[*start, *encode(text), 0] for text in TEXTS]
    assert read_back(job.output) == [[*one, *[1] * (-len(one) % 8)] for one in ids]
    assert check_indexed_dataset(job.output).sidecar == summary.sidecar
    assert summary.sidecar.tokenizer.start == tuple(start)
    assert summary.sidecar.longest_document_tokens == max(map(len, ids))


def test_documents_are_whole_whatever_the_tokenizer_stores(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "tokenizer", pad_token="<|pad|>")
    store_truncation(name, pad_to=16)
    texts = [make_text(1, 200), "short"]
    path = as_jsonl(tmp_path / "x.jsonl", texts)
    job = options(tmp_path, path, tokenizer_kind="huggingface", tokenizer_name=name)
    sidecar = preprocess(job).sidecar
    decode = HuggingFaceTokenizer(name).decode
    assert [decode(ids) for ids in read_back(job.output)] == texts
    assert sidecar.tokens > 200 and sidecar.pad_tokens == 0


def test_counts_in_the_sidecar(tmp_path: Path) -> None:
    sidecar = preprocess(options(tmp_path, as_jsonl(tmp_path / "x.jsonl"))).sidecar
    sizes = [len(text.encode()) for text in TEXTS]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    assert (sidecar.documents, sidecar.tokens) == (60, sum(sizes) + 60)
    assert (sidecar.text_bytes, sidecar.max_token_id) == (sum(sizes), 256)
    assert sidecar.longest_document_tokens == sizes[longest] + 1
    assert sidecar.longest_source == f"{tmp_path / 'x.jsonl'}:{longest + 1}"


@pytest.mark.parametrize("align", [2, 64, 100])
def test_aligned_documents_start_on_the_grid(tmp_path: Path, align: int) -> None:
    summary = preprocess(options(tmp_path, as_jsonl(tmp_path / "x.jsonl"), align=align))
    documents = read_back(str(tmp_path / "out"))
    padding = 0
    for document, text in zip(documents, TEXTS, strict=True):
        ids = [*text.encode(), 256]
        assert document[: len(ids)] == ids
        assert set(document[len(ids) :]) <= {257}
        assert len(document) % align == 0
        assert len(document) - len(ids) < align
        padding += len(document) - len(ids)
    assert (summary.sidecar.pad_tokens, summary.sidecar.align) == (padding, align)


def test_workers_and_shards_change_no_byte(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    results = []
    for workers, shard_bytes in ((1, None), (1, 300), (2, 700)):
        job = options(tmp_path, path, workers=workers, shard_bytes=shard_bytes, align=8)
        job = replace(job, output=str(tmp_path / f"out{len(results)}"))
        preprocess(job)
        results.append(outputs(job.output))
    assert results[0] == results[1] == results[2]


class Interrupted(Exception):
    pass


class StopsAfter(Progress):
    """Interrupts the job after some shards, as a signal would; ``shards`` counts those begun."""

    def __init__(self, after: int) -> None:
        self.after, self.done_bytes = after, 0

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        self.done_bytes = done_bytes

    def advance(self, size: int, tokens: int) -> None:
        self.after -= 1
        if self.after == 0:
            raise Interrupted

    def merging(self) -> None:
        if self.after > 0:
            raise Interrupted


def test_interrupted_anywhere_the_bytes_are_the_same(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    whole = options(tmp_path, path, output=str(tmp_path / "whole"), shard_bytes=700)
    shards = preprocess(whole).shards
    assert shards > 5
    job = options(tmp_path, path, shard_bytes=700)
    done_before = 0
    for _ in range(2):  # interrupted twice among the shards, then once before merging
        stop = StopsAfter(2)
        with pytest.raises(Interrupted):
            preprocess(job, stop)
        assert stop.done_bytes >= done_before
        done_before = stop.done_bytes
        assert not any(p(job.output).exists() for p in (bin_path, idx_path, sidecar_path))
    assert done_before > 0
    with pytest.raises(Interrupted):
        preprocess(job, StopsAfter(1000))
    summary = preprocess(job)
    assert summary.shards_resumed == shards
    assert outputs(job.output) == outputs(whole.output)
    assert not Path(f"{job.output}.partial").exists()


def test_rests_of_a_published_job_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "shard-000000.json").write_text("from an older job")
    preprocess(options(tmp_path, as_jsonl(tmp_path / "x.jsonl")))
    assert read_back(str(tmp_path / "out")) == [[*text.encode(), 256] for text in TEXTS]
    assert not folder.exists()


def test_interrupted_between_the_last_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    whole = options(tmp_path, path, output=str(tmp_path / "whole"))
    preprocess(whole)
    job = options(tmp_path, path)
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target) == idx_path(job.output):
            raise Interrupted
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(Interrupted):
            preprocess(job)
    assert bin_path(job.output).exists()
    assert not idx_path(job.output).exists()
    preprocess(job)
    assert outputs(job.output) == outputs(whole.output)


def test_a_damaged_finished_shard_is_done_again(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    whole = options(tmp_path, path, output=str(tmp_path / "whole"), shard_bytes=700)
    preprocess(whole)
    job = options(tmp_path, path, shard_bytes=700)
    with pytest.raises(Interrupted):
        preprocess(job, StopsAfter(3))
    shard = tmp_path / "out.partial" / "shard-000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    preprocess(job)
    assert outputs(job.output) == outputs(whole.output)


def test_another_job_is_not_continued(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    job = options(tmp_path, path, shard_bytes=700)
    with pytest.raises(Interrupted):
        preprocess(job, StopsAfter(2))
    with pytest.raises(ValueError, match=r"another options.align \(0, now 8\)"):
        preprocess(replace(job, align=8))
    with pytest.raises(ValueError, match=r"another tokenizer\.kind"):
        name = save_tokenizer(tmp_path / "tokenizer")
        preprocess(replace(job, tokenizer_kind="huggingface", tokenizer_name=name))
    as_jsonl(path, TEXTS[:-1])
    with pytest.raises(ValueError, match=r"another inputs\[0\].size"):
        preprocess(job)


def test_two_jobs_on_one_output(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    job = options(tmp_path, path, shard_bytes=700)

    class StartsAgain(Progress):
        def advance(self, size: int, tokens: int) -> None:
            preprocess(job)

    with pytest.raises(ValueError, match="another process is writing"):
        preprocess(job, StartsAgain())


def test_damaged_documents_are_counted_and_placed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = [json.dumps({"text": text}) for text in TEXTS]
    lines = [*good[:20], "{", *good[20:40], '{"text": 1}', "", *good[40:]]
    path.write_text("\n".join(lines))
    summary = preprocess(options(tmp_path, path, shard_bytes=300))
    assert summary.sidecar.skipped == {"bad_json": 1, "not_text": 1, "empty": 1}
    assert summary.examples == [f"{path}:21 bad_json", f"{path}:42 not_text"]
    assert read_back(summary.prefix) == [[*text.encode(), 256] for text in TEXTS]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_document_stops_the_job_on_request(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "x.jsonl"
    good = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*good[:20], "", "{", *good[20:], "[]"]))
    job = options(tmp_path, path, on_error=OnError.stop, shard_bytes=300, workers=workers)
    with pytest.raises(ValueError, match=r"x\.jsonl:22 bad_json \(on_error=stop\)"):
        preprocess(job)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_nothing_usable(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{\n\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"usable document \(1 bad_json, 1 empty, 1 not_text\)"):
        preprocess(options(tmp_path, path))
    path.write_text("")
    with pytest.raises(ValueError, match="they are empty"):
        preprocess(options(tmp_path, path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    job = options(tmp_path, path)
    preprocess(job)
    before = outputs(job.output)
    with pytest.raises(ValueError, match="exists: choose another output, or give overwrite=true"):
        preprocess(replace(job, align=4))
    assert outputs(job.output) == before
    preprocess(replace(job, align=4, overwrite=True))
    assert check_indexed_dataset(job.output).sidecar.align == 4  # type: ignore[union-attr]


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    text = tmp_path / "x.bin"
    text.write_text("some text")
    with pytest.raises(ValueError, match="would replace the input"):
        preprocess(options(tmp_path, text, output=str(tmp_path / "x"), overwrite=True))
    assert text.read_text() == "some text"


@pytest.mark.parametrize("name", ["x.bin", "x.idx", "x.meta.json"])
@pytest.mark.parametrize("kind", ["symbolic", "hard", "dots", "output"])
def test_an_input_is_never_replaced_under_another_name(
    tmp_path: Path, name: str, kind: str
) -> None:
    text = tmp_path / "in" / "text.txt"
    text.parent.mkdir()
    text.write_text("some text")
    output = tmp_path / "out" / "x"
    output.parent.mkdir()
    given = text
    if kind == "symbolic":  # the output's place is a link to the input
        (output.parent / name).symlink_to(text)
    elif kind == "hard":
        os.link(text, output.parent / name)
    else:  # the input lies at the output's place, named by a way round, or by a link
        given = output.parent / ".." / "out" / name
        given.write_text("some text")
        if kind == "output":
            given = tmp_path / "in" / "link.txt"
            given.symlink_to(output.parent / name)
    job = options(tmp_path, given, output=str(output), format=InputFormat.text, overwrite=True)
    with pytest.raises(ValueError, match="would replace the input"):
        preprocess(job)
    assert given.read_text() == text.read_text() == "some text"
    assert not Path(f"{output}.partial").exists()


def test_a_prefix_that_names_a_folder(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    for output in (f"{tmp_path}/", f"{tmp_path}/.", f"{tmp_path}/..", ""):
        with pytest.raises(ValueError, match="names a folder: give a prefix, as dir/corpus"):
            preprocess(options(tmp_path, path, output=output))
    with pytest.raises(ValueError, match=r"x\.jsonl is a file, not a folder"):
        preprocess(options(tmp_path, path, output=f"{path}/out"))
    (tmp_path / "y.bin").mkdir()
    with pytest.raises(ValueError, match=r"y\.bin is a folder: choose another"):
        preprocess(options(tmp_path, path, output=f"{tmp_path}/y", overwrite=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl", "y.bin"]


def test_what_a_killed_replacement_leaves_is_the_jobs(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with replacing(tmp_path / "out.partial" / "shard-000005.json") as beside:
        beside.write_text("{}")
    beside.write_text("{")  # as if the process had been killed before the end
    preprocess(options(tmp_path, as_jsonl(tmp_path / "x.jsonl")))
    assert not beside.parent.exists()


@pytest.mark.parametrize("link", [False, True])
def test_the_working_folder_is_nobodys(tmp_path: Path, link: bool) -> None:
    """Its content is deleted at the end of a job."""
    folder = tmp_path / "out.partial"
    folder.mkdir()
    path = as_jsonl(folder / "x.jsonl")
    given = path
    if link:
        given = tmp_path / "link.jsonl"
        given.symlink_to(path)
    with pytest.raises(ValueError, match=r"out\.partial is needed, but the input .* lies in it"):
        preprocess(options(tmp_path, given))
    other = as_jsonl(tmp_path / "y.jsonl")
    with pytest.raises(ValueError, match=r"x\.jsonl is not part of a job: move it"):
        preprocess(options(tmp_path, other))
    assert [p.name for p in folder.iterdir()] == ["x.jsonl"]
    path.unlink()
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(ValueError, match=r"out\.partial is a file"):
        preprocess(options(tmp_path, other))


def test_files_that_look_like_something_else_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    with pytest.raises(ValueError, match="one JSON array"):
        preprocess(options(tmp_path, path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    as_jsonl(path)
    preprocess(options(tmp_path, path))
    assert read_back(str(tmp_path / "out")) == [[*text.encode(), 256] for text in TEXTS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers=0"),
        ({"align": -1}, "align=-1"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"inputs": ("nowhere.txt",)}, "nowhere.txt does not exist"),
        ({"tokenizer_kind": "huggingface"}, "needs the name"),
        ({"eod_id": 3}, "byte tokenizer's marks are fixed"),
    ],
)
def test_mistakes_write_nothing(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=message):
        preprocess(options(tmp_path, path, **changes))
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_alignment_needs_a_padding_id(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "x.jsonl")
    name = save_tokenizer(tmp_path / "tokenizer", pad_token="<|end|>")
    job = options(tmp_path, path, tokenizer_kind="huggingface", tokenizer_name=name, align=8)
    with pytest.raises(ValueError, match="choose one with pad_id"):
        preprocess(job)
    preprocess(replace(job, pad_id=1))
    assert all(len(document) % 8 == 0 for document in read_back(job.output))
