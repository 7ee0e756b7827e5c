#!/usr/bin/env python3
"""Text, JSONL and Parquet files to a Megatron dataset: PREFIX.bin, PREFIX.idx, PREFIX.meta.json.

    python tools/preprocess_data.py books/ --output data/books --workers 8
    python tools/preprocess_data.py web.jsonl --output data/web --tokenizer ~/models/Qwen3-4B-Base
    python tools/preprocess_data.py code.parquet --column content --output data/code --align 1024

Started again after an interruption, the same command continues where it was. docs/data.md has more.
"""

import argparse
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ttt.config.arguments import (
    WHOLE,
    FlagCondition,
    OneLineParser,
    bounded,
    flag_notices,
    tell,
)
from megatron_ttt.config.bounds import INT32, Bound
from megatron_ttt.config.schema import Bos
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.data.preprocessing import PreprocessOptions, Progress, Summary, preprocess
from megatron_ttt.data.shards import OnError

FLAGS = {
    "--json-key": FlagCondition(
        lambda given: given.format in ("auto", "jsonl"), "but with --format jsonl or auto"
    ),
    "--column": FlagCondition(
        lambda given: given.format in ("auto", "parquet"), "but with --format parquet or auto"
    ),
    "--pattern": FlagCondition(
        lambda given: any(Path(name).is_dir() for name in given.inputs), "without a folder"
    ),
}
LOG_SECONDS = 10.0  # between two progress lines where there is no terminal


def parse(arguments: list[str]) -> PreprocessOptions:
    parser = OneLineParser(
        prog="preprocess_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, or folders to search")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .meta.json")
    formats = [format.value for format in InputFormat]
    add("--format", choices=formats, default="auto", help="auto: by suffix and content (default)")
    add("--pattern", help="file names taken from folders, e.g. '*.md' (default: by format)")
    add("--json-key", default="text", metavar="KEY", help="field of a JSONL record (default: text)")
    add("--column", default="text", metavar="NAME", help="column of a Parquet file (default: text)")
    add(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes (default), a folder with tokenizer.json, or a Hugging Face hub name",
    )
    marks = [choice.value for choice in Bos]
    add(
        "--bos",
        choices=marks,
        default="model",
        help="before a document: what the tokenizer adds itself (model, default), its"
        " beginning-of-sequence token (add), or nothing (none)",
    )
    add("--eod-id", type=WHOLE, metavar="ID", help="end of document, if not end of sequence")
    add("--pad-id", type=WHOLE, metavar="ID", help="padding, if the tokenizer has none of its own")
    add(
        "--align",
        type=WHOLE,
        default=0,
        metavar="N",
        help="pad documents to multiples of N tokens, e.g. ttt.chunk_size (default: 0, off)",
    )
    errors = [choice.value for choice in OnError]
    add("--on-error", choices=errors, default="skip", help="damaged documents (default: skip)")
    add(
        "--workers",
        type=bounded(Bound(-INT32, 1024)),
        default=1,
        metavar="N",
        help="processes (default: 1)",
    )
    add(
        "--shard-bytes",
        type=bounded(Bound(-INT32, 2**62)),
        metavar="N",
        help="input per unit of work (default: by size)",
    )
    add("--overwrite", action="store_true", help="replace a dataset at PREFIX")
    given = parser.parse_args(arguments)
    for line in flag_notices(parser, given, FLAGS):
        print(line, file=sys.stderr)
    is_bytes = given.tokenizer == "bytes"
    return PreprocessOptions(
        inputs=tuple(given.inputs),
        output=given.output,
        format=InputFormat(given.format),
        pattern=given.pattern,
        json_key=given.json_key,
        column=given.column,
        tokenizer_kind="bytes" if is_bytes else "huggingface",
        tokenizer_name=None if is_bytes else str(Path(given.tokenizer).expanduser()),
        eod_id=given.eod_id,
        pad_id=given.pad_id,
        bos=Bos(given.bos),
        align=given.align,
        on_error=OnError(given.on_error),
        workers=given.workers,
        overwrite=given.overwrite,
        shard_bytes=given.shard_bytes,
    )


class TerminalProgress(Progress):
    """A bar over input bytes on a terminal; elsewhere a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("tokenising", total=None, rate="")
        self._total = self._done = self._tokens = 0
        self._started = self._logged = time.monotonic()

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        self._total, self._done = total_bytes, done_bytes
        if done_bytes:
            self._console.print(f"continuing: {done_bytes / total_bytes:.0%} was done before")
        self._bar.update(self._task, total=total_bytes, completed=done_bytes)
        self._bar.start()

    def advance(self, size: int, tokens: int) -> None:
        now = time.monotonic()
        self._done, self._tokens = self._done + size, self._tokens + tokens
        rate = f"{self._tokens / max(now - self._started, 1e-9) / 1e6:.2f} M tokens/s"
        self._bar.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._console.print(f"{self._done / max(self._total, 1):.1%} of the input, {rate}")

    def merging(self) -> None:
        self._bar.update(self._task, description="merging")

    def end(self) -> None:
        self._bar.stop()


def report(summary: Summary) -> list[str]:
    """The closing lines."""
    sidecar = summary.sidecar
    skipped = sum(sidecar.skipped.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sidecar.skipped.items())
    left_out = f"skipped {skipped:,} ({reasons})" if skipped else "none skipped"
    text_tokens = sidecar.tokens - sidecar.pad_tokens
    rate = summary.new_tokens / max(summary.seconds, 1e-9)
    resumed = f", {summary.shards_resumed:,} of them done before" if summary.shards_resumed else ""
    begin = ", ".join(map(str, sidecar.tokenizer.start)) or "no mark"
    lines = [
        f"documents   {sidecar.documents:,}; {left_out}",
        f"tokens      {sidecar.tokens:,}, of which {sidecar.pad_tokens:,} padding;"
        f" largest id {sidecar.max_token_id} of {sidecar.tokenizer.vocab_size}",
        f"marks       a document begins with {begin}, and ends with {sidecar.tokenizer.eod}",
        f"text        {sidecar.text_bytes:,} bytes, {sidecar.text_bytes / text_tokens:.3f} a token",
        f"longest     {sidecar.longest_document_tokens:,} tokens: {sidecar.longest_source}",
        f"speed       {rate / 1e6:.2f} M tokens/s ({summary.seconds:.1f} s, {summary.shards:,}"
        f" shards{resumed})",
        f"written     {summary.prefix}.bin ({summary.bin_bytes:,} bytes), .idx, .meta.json",
    ]
    return lines + [f"skipped     {example}" for example in summary.examples]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    progress = TerminalProgress(Console(stderr=True))
    again = f"the finished part is kept in {options.output}.partial: start again to continue"
    try:
        summary = preprocess(options, progress)
    except ValueError as error:
        progress.end()
        return tell(error)
    except BrokenProcessPool:
        progress.end()
        print(f"error: a worker was killed (out of memory?); {again}", file=sys.stderr)
        return 1
    except OSError as error:
        progress.end()
        print(f"error: {error}; {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.end()
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    print("\n".join(report(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
