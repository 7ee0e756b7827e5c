"""One shard of a preprocessing job: read its pieces, tokenise, write, and report what was seen.

This is all a worker process does. It imports neither torch nor Megatron, so workers start fast.
"""

import functools
import json
import os
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import Enum
from multiprocessing import parent_process
from pathlib import Path

import numpy as np

from megatron_ttt.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype, write_json
from megatron_ttt.data.inputs import InputFile
from megatron_ttt.data.readers import Damage, Document, Piece, read_piece
from megatron_ttt.data.tokenizers import Tokenizer, TokenizerIdentity, document_ids, load_tokenizer

EXAMPLES_PER_SHARD = 3


class OnError(Enum):
    """What a damaged document does: ``skip`` counts it and goes on, ``stop`` ends the job."""

    skip = "skip"
    stop = "stop"


@dataclass(frozen=True)
class TextOptions:
    """How documents are found in the inputs and turned into tokens."""

    tokenizer: TokenizerIdentity
    json_key: str = "text"
    column: str = "text"
    align: int = 0  # documents are padded to a multiple of this many tokens; 0: not at all
    on_error: OnError = OnError.skip


@dataclass(frozen=True)
class ShardJob:
    """Work for one worker. ``folder`` receives ``shard-NNNNNN.{bin,idx,json}``, the .json last."""

    number: int
    folder: str
    pieces: tuple[Piece, ...]
    files: tuple[InputFile, ...]  # the input file of each piece
    options: TextOptions

    @property
    def prefix(self) -> Path:
        return Path(self.folder) / f"shard-{self.number:06d}"

    @property
    def report_path(self) -> Path:
        return self.prefix.with_suffix(".json")


@dataclass
class ShardReport:
    """What one shard held. ``place`` of a piece counts its lines or rows from 1."""

    number: int
    size: int = 0  # input bytes
    documents: int = 0
    tokens: int = 0  # padding included
    pad_tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = -1
    longest_tokens: int = 0
    longest_place: tuple[int, int] = (0, 0)  # (piece of this shard, place in it)
    places: list[int] = field(default_factory=list)  # lines or rows seen, per piece
    skipped: dict[str, int] = field(default_factory=dict)  # by Damage
    examples: list[tuple[int, int, str]] = field(default_factory=list)  # (piece, place, Damage)
    stopped: bool = False  # on_error=stop met the last example

    @classmethod
    def read(cls, path: Path) -> "ShardReport":
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["longest_place"] = tuple(fields["longest_place"])
        fields["examples"] = [tuple(example) for example in fields["examples"]]
        return cls(**fields)


def finished_report(job: ShardJob) -> ShardReport | None:
    """Return the report of a shard that an earlier start completed; None if it has to be done."""
    if not job.report_path.is_file():
        return None
    report = ShardReport.read(job.report_path)
    itemsize = token_dtype(job.options.tokenizer.vocab_size).itemsize
    data = bin_path(job.prefix)
    whole = data.is_file() and data.stat().st_size == report.tokens * itemsize
    return report if whole and idx_path(job.prefix).is_file() else None


def write_shard(job: ShardJob) -> ShardReport:
    """Tokenise the shard's documents, each between the marks of its beginning and its end.

    The files appear by renames, the report last: a shard with a report is complete, whenever the
    process was killed. A shard that stops at a damaged document writes nothing.
    """
    tokenizer = _tokenizer(job.options.tokenizer)
    report = ShardReport(job.number, size=sum(piece.size for piece in job.pieces))
    skipped: Counter[str] = Counter()
    beside = job.prefix.with_name(f"{job.prefix.name}.{os.getpid()}")
    writer = IndexedWriter(beside, token_dtype(tokenizer.vocab_size))
    try:
        with writer:
            for number, (piece, file) in enumerate(zip(job.pieces, job.files, strict=True)):
                report.places.append(0)
                options = job.options
                documents = read_piece(
                    file, piece, json_key=options.json_key, column=options.column
                )
                for document in documents:
                    report.places[number] = document.place
                    if document.text is not None:
                        _add(
                            writer, document.text, (number, document.place), tokenizer, job, report
                        )
                    elif _count_damage(document, number, skipped, job, report):
                        raise _Stopped
    except _Stopped:
        report.stopped = True
        bin_path(beside).unlink()
        return report
    report.skipped = dict(sorted(skipped.items()))
    bin_path(beside).replace(bin_path(job.prefix))
    idx_path(beside).replace(idx_path(job.prefix))
    write_json(job.report_path, asdict(report))
    return report


class _Stopped(Exception):
    """A damaged document under ``on_error=stop``."""


def _add(
    writer: IndexedWriter,
    text: str,
    where: tuple[int, int],
    tokenizer: Tokenizer,
    job: ShardJob,
    report: ShardReport,
) -> None:
    """Append one document: marks around its tokens, then padding up to ``align``."""
    ids = document_ids(tokenizer, text)
    align = job.options.align
    padding = -(len(ids) + 1) % align if align else 0
    pad = tokenizer.pad if tokenizer.pad is not None else tokenizer.eod
    assert not padding or tokenizer.pad is not None
    tokens = np.concatenate([ids, [tokenizer.eod], np.full(padding, pad)]).astype(np.int64)
    writer.add(tokens)
    report.documents += 1
    report.tokens += len(tokens)
    report.pad_tokens += padding
    report.text_bytes += len(text.encode("utf-8"))
    report.max_token_id = max(report.max_token_id, int(tokens.max()))
    if len(ids) + 1 > report.longest_tokens:
        report.longest_tokens, report.longest_place = len(ids) + 1, where


def _count_damage(
    document: Document, number: int, skipped: Counter[str], job: ShardJob, report: ShardReport
) -> bool:
    """Count a document that is left out; True if the job has to stop here."""
    assert document.damage is not None
    skipped[document.damage.value] += 1
    if document.damage is Damage.empty:
        return False
    stop = job.options.on_error is OnError.stop
    if stop or len(report.examples) < EXAMPLES_PER_SHARD:
        report.examples.append((number, document.place, document.damage.value))
    return stop


@functools.lru_cache(maxsize=1)
def _tokenizer(identity: TokenizerIdentity) -> Tokenizer:
    """Return the tokenizer, loaded once per process, with the ids that the job's identity fixed.

    Raises:
        ValueError: it can no longer be loaded, or its rules changed since the job began.
    """
    if identity.kind == "bytes":
        return load_tokenizer(identity.kind)
    tokenizer = load_tokenizer(
        identity.kind, identity.name, eod=identity.eod, pad=identity.pad, start=identity.start
    )
    if tokenizer.identity != identity:
        raise ValueError(
            f"tokenizer {identity.name} changed while it was used: it is now {tokenizer.identity}"
        )
    return tokenizer


def exit_with_parent() -> None:
    """Initialise a worker: end it when the program that started it is gone, however it went.

    A worker of a killed pool waits for work for ever: it holds an end of the pool's pipe itself.
    """
    parent = parent_process()
    assert parent is not None, "called outside a worker process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()
