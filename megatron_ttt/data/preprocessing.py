"""Text, JSONL and Parquet files to one Megatron dataset: planned, sharded, restartable, merged.

    plan    list the inputs and cut them into shards (a function of the inputs alone)
    shards  each is tokenised by one worker into ``PREFIX.partial/``; with its report there it is
            complete and never done again
    merge   concatenate them in order beside the shards, then rename to ``PREFIX.bin``,
            ``PREFIX.meta.json`` and, last, ``PREFIX.idx``

The result has the same bytes whatever the number of workers and however often the job was killed.
"""

import fcntl
import json
import multiprocessing
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ttt.config.schema import Bos
from megatron_ttt.data.indexed import (
    Sidecar,
    bin_path,
    idx_path,
    merge_indexed,
    sidecar_path,
    token_dtype,
    write_json,
)
from megatron_ttt.data.inputs import InputFile, InputFormat, list_inputs
from megatron_ttt.data.outputs import check_output
from megatron_ttt.data.readers import Damage, cut_shards, place_in
from megatron_ttt.data.shards import (
    OnError,
    ShardJob,
    ShardReport,
    TextOptions,
    exit_with_parent,
    finished_report,
    write_shard,
)
from megatron_ttt.data.tokenizers import load_tokenizer
from megatron_ttt.files import sync_folder

MANIFEST_VERSION = 1
_EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class PreprocessOptions:
    """Everything a preprocessing job is told. ``workers`` and ``overwrite`` alter no byte of it."""

    inputs: tuple[str, ...]
    output: str  # prefix of the .bin/.idx pair
    format: InputFormat = InputFormat.auto
    pattern: str | None = None
    json_key: str = "text"
    column: str = "text"
    tokenizer_kind: str = "bytes"
    tokenizer_name: str | None = None
    eod_id: int | None = None
    pad_id: int | None = None
    bos: Bos = Bos.model
    align: int = 0
    on_error: OnError = OnError.skip
    workers: int = 1
    overwrite: bool = False
    shard_bytes: int | None = None


@dataclass
class Summary:
    """What a job did: ``new_tokens`` were made in ``seconds``, the rest by earlier starts."""

    sidecar: Sidecar
    prefix: str
    bin_bytes: int
    shards: int
    shards_resumed: int
    new_tokens: int
    seconds: float
    examples: list[str] = field(default_factory=list)  # "file:line reason" of skipped documents


class Progress:
    """What the job tells while it works; this one says nothing."""

    def begin(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, size: int, tokens: int) -> None: ...

    def merging(self) -> None: ...

    def end(self) -> None: ...


def preprocess(options: PreprocessOptions, progress: Progress | None = None) -> Summary:
    """Run the job, or continue it.

    Raises:
        ValueError: a user's mistake, in one line: inputs, tokenizer, alignment, an existing
            output, other options than those the unfinished job began with, a damaged document under
            ``on_error=stop``, or no document at all. Nothing is then written at the output's
            prefix.
        OSError: the disk is full or a file unreadable; the finished shards are kept.
        concurrent.futures.process.BrokenProcessPool: a worker was killed; likewise.
    """
    started = time.monotonic()
    progress = progress if progress is not None else Progress()
    _check_numbers(options)
    files, jobs, manifest = _plan(options)
    folder = Path(f"{options.output}.partial")
    check_output(options.output, folder, files, overwrite=options.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _begin_or_continue(folder, manifest)
        reports, resumed = _run_shards(jobs, options.workers, progress)
        places = _Places(files, jobs, reports)
        stopped = next((report for report in reports if report.stopped), None)
        if stopped is not None or not any(report.documents for report in reports):
            shutil.rmtree(folder)
            raise ValueError(_nothing_usable(stopped, reports, places))
        progress.merging()
        sidecar = _make_sidecar(options, jobs, reports, places)
        _publish(options, folder, jobs, sidecar)
    progress.end()
    fresh = [report for report in reports if report.number not in resumed]
    examples = [places.describe(r, example) for r in reports for example in r.examples]
    return Summary(
        sidecar=sidecar,
        prefix=options.output,
        bin_bytes=bin_path(options.output).stat().st_size,
        shards=len(jobs),
        shards_resumed=len(resumed),
        new_tokens=sum(report.tokens for report in fresh),
        seconds=time.monotonic() - started,
        examples=examples[:_EXAMPLES_SHOWN],
    )


def _check_numbers(options: PreprocessOptions) -> None:
    if options.workers < 1:
        raise ValueError(f"workers={options.workers}: at least one is needed")
    if options.align < 0:
        raise ValueError(f"align={options.align}: a number of tokens, or 0 for none")
    if options.shard_bytes is not None and options.shard_bytes < 1:
        raise ValueError(f"shard_bytes={options.shard_bytes}: at least 1")


def _plan(options: PreprocessOptions) -> tuple[list[InputFile], list[ShardJob], dict[str, Any]]:
    """Return the inputs, the shards, and the record of both that a continued job must equal."""
    files = list_inputs(options.inputs, format=options.format, pattern=options.pattern)
    shards = cut_shards(files, column=options.column, shard_bytes=options.shard_bytes)
    identity = load_tokenizer(
        options.tokenizer_kind,
        options.tokenizer_name,
        eod=options.eod_id,
        pad=options.pad_id,
        start=options.bos,
    ).identity
    if options.align > 1 and identity.pad is None:
        raise ValueError(
            f"align={options.align} needs a padding id other than end of document"
            f" ({identity.eod}), which tokenizer {identity.name} lacks: choose one with pad_id"
        )
    text = TextOptions(
        tokenizer=identity,
        json_key=options.json_key,
        column=options.column,
        align=options.align,
        on_error=options.on_error,
    )
    folder = f"{options.output}.partial"
    jobs = [
        ShardJob(number, folder, tuple(pieces), tuple(files[p.file] for p in pieces), text)
        for number, pieces in enumerate(shards)
    ]
    manifest = {
        "version": MANIFEST_VERSION,
        "tokenizer": identity.as_dict(),
        "options": {
            "json_key": options.json_key,
            "column": options.column,
            "align": options.align,
            "on_error": options.on_error.value,
        },
        "inputs": [{**asdict(file), "format": file.format.value} for file in files],
        "shards": [[asdict(piece) for piece in pieces] for pieces in shards],
    }
    return files, jobs, manifest


def _begin_or_continue(folder: Path, manifest: dict[str, Any]) -> None:
    """Record the job in a new folder, or compare it with the unfinished one recorded there.

    Raises:
        ValueError: the unfinished job is another one; names what differs.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        for rest in folder.iterdir():  # of a job that was published, or that never began
            if rest.name != "lock":
                rest.unlink()
        write_json(path, manifest)
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete {path.parent}") from error
    changed = _first_difference(begun, manifest, "")
    if changed is not None:
        raise ValueError(
            f"{path.parent} holds an unfinished job with another {changed}: give the same inputs"
            " and options to continue it, or delete that folder to start over"
        )


def _first_difference(old: Any, new: Any, name: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            inside = f"{name}.{key}" if name else key
            found = _first_difference(old.get(key), new.get(key), inside)
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"number of {name} ({len(old)}, now {len(new)})"
        pairs = enumerate(zip(old, new, strict=True))
        found_all = (_first_difference(a, b, f"{name}[{i}]") for i, (a, b) in pairs)
        return next((found for found in found_all if found is not None), None)
    return None if old == new else f"{name} ({old!r}, now {new!r})"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only process that works on an output.

    Raises:
        ValueError: another process works on it right now.
    """
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}") from error
        yield


def _run_shards(
    jobs: Sequence[ShardJob], workers: int, progress: Progress
) -> tuple[list[ShardReport], set[int]]:
    """Return reports in the shards' order, up to the first that stopped, and which were done."""
    done = {job.number: report for job in jobs if (report := finished_report(job)) is not None}
    todo = [job for job in jobs if job.number not in done]
    progress.begin(
        total_bytes=sum(piece.size for job in jobs for piece in job.pieces),
        done_bytes=sum(report.size for report in done.values()),
    )
    reports = dict(done)
    with _mapper(min(workers, len(todo))) as each:
        for report in each(write_shard, todo):
            reports[report.number] = report
            progress.advance(report.size, report.tokens)
            if report.stopped:
                break
    return [reports[number] for number in sorted(reports)], set(done)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Any]]:
    """``map`` in this process or over a pool; results in order, a killed worker is an error."""
    if workers <= 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=exit_with_parent) as pool:

        def submit(function: Callable[..., Any], jobs: Sequence[Any]) -> Iterator[Any]:
            # A terminal's interrupt goes to every process, also to one that still imports; the
            # workers, started here, inherit the blocked signal, and the program alone answers it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.map(function, jobs)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            yield submit
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Places:
    """Turns (shard, piece, place in it) into ``file:line``, counting over the pieces before it."""

    def __init__(
        self, files: Sequence[InputFile], jobs: Sequence[ShardJob], reports: Sequence[ShardReport]
    ) -> None:
        self._files, self._jobs = files, jobs
        self._before: dict[tuple[int, int], int] = {}
        seen: Counter[int] = Counter()
        for report in reports:
            for number, count in enumerate(report.places):
                piece = jobs[report.number].pieces[number]
                self._before[report.number, number] = seen[piece.file]
                seen[piece.file] += count

    def find(self, report: ShardReport, number: int, place: int) -> str:
        file = self._files[self._jobs[report.number].pieces[number].file]
        return place_in(file, self._before[report.number, number] + place)

    def describe(self, report: ShardReport, example: tuple[int, int, str]) -> str:
        number, place, reason = example
        return f"{self.find(report, number, place)} {reason}"


def _nothing_usable(
    stopped: ShardReport | None, reports: Sequence[ShardReport], places: _Places
) -> str:
    if stopped is not None:
        return f"{places.describe(stopped, stopped.examples[-1])} (on_error=stop)"
    skipped = sum((Counter(report.skipped) for report in reports), Counter[str]())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return f"the inputs hold no usable document ({reasons or 'they are empty'})"


def _make_sidecar(
    options: PreprocessOptions,
    jobs: Sequence[ShardJob],
    reports: Sequence[ShardReport],
    places: _Places,
) -> Sidecar:
    identity = jobs[0].options.tokenizer
    longest = max(reports, key=lambda report: report.longest_tokens)
    skipped = sum((Counter(report.skipped) for report in reports), Counter[str]())
    return Sidecar(
        tokenizer=identity,
        dtype=str(token_dtype(identity.vocab_size)),
        documents=sum(report.documents for report in reports),
        tokens=sum(report.tokens for report in reports),
        pad_tokens=sum(report.pad_tokens for report in reports),
        text_bytes=sum(report.text_bytes for report in reports),
        max_token_id=max(report.max_token_id for report in reports),
        align=options.align,
        longest_document_tokens=longest.longest_tokens,
        longest_source=places.find(longest, *longest.longest_place),
        skipped={kind.value: skipped[kind.value] for kind in Damage if skipped[kind.value]},
    )


def _publish(
    options: PreprocessOptions, folder: Path, jobs: Sequence[ShardJob], sidecar: Sidecar
) -> None:
    """Merge beside the shards, then rename. The .idx comes last: without it there is no dataset."""
    merged = folder / "merged"
    dtype = token_dtype(sidecar.tokenizer.vocab_size)
    merge_indexed([job.prefix for job in jobs], merged, dtype)
    sidecar.write(sidecar_path(merged))
    (folder / "publishing").touch()
    idx_path(options.output).unlink(missing_ok=True)
    bin_path(merged).replace(bin_path(options.output))
    sidecar_path(merged).replace(sidecar_path(options.output))
    idx_path(merged).replace(idx_path(options.output))
    sync_folder(bin_path(options.output).parent)
    # the manifest goes first: a folder without one is rubbish, whatever else is still in it
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder)
