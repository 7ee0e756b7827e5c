#!/usr/bin/env python3
"""Text, JSONL and Parquet files to a Megatron dataset: PREFIX.bin, PREFIX.idx, PREFIX.meta.json.

    python tools/preprocess_data.py books/ output=data/books workers=8
    python tools/preprocess_data.py web.jsonl output=data/web tokenizer=~/models/Qwen3-4B-Base
    python tools/preprocess_data.py code.parquet column=content output=data/code align=1024

Started again after an interruption, the same command continues where it was. docs/data.md has more.
"""

import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ttt.config.bounds import INT32, Bound
from megatron_ttt.config.command import Command, run_command, tell
from megatron_ttt.config.effects import Condition
from megatron_ttt.config.schema import Bos
from megatron_ttt.data.inputs import InputFormat
from megatron_ttt.data.preprocessing import PreprocessOptions, Progress, Summary, preprocess
from megatron_ttt.data.shards import OnError

LOG_SECONDS = 10.0  # between two progress lines where there is no terminal


@dataclass
class Keys:
    """Tokenise files: words without KEY= are files, or folders to search."""

    inputs: list[str] = MISSING  # files, or folders to search
    output: str = MISSING  # PREFIX; writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json
    format: InputFormat = InputFormat.auto  # auto: by suffix and content
    pattern: str | None = None  # file names taken from folders, such as '*.md'; null: by format
    json_key: str = "text"  # field of a JSONL record
    column: str = "text"  # column of a Parquet file
    tokenizer: str = "bytes"  # bytes, a folder with tokenizer.json, or a Hugging Face hub name
    bos: Bos = Bos.model  # before a document; model: what the tokenizer itself adds
    eod_id: int | None = None  # end of document; null: end of sequence
    pad_id: int | None = None  # padding, if the tokenizer has none of its own
    align: int = 0  # pad documents to multiples of so many tokens, as ttt.chunk_size; 0: off
    on_error: OnError = OnError.skip  # at a damaged document
    workers: int = 1  # processes
    shard_bytes: int | None = None  # input per unit of work; null: by size
    overwrite: bool = False  # replace a dataset at PREFIX


EFFECTS = {
    "json_key": (
        Condition("format", lambda keys: keys.format in (InputFormat.auto, InputFormat.jsonl)),
    ),
    "column": (
        Condition("format", lambda keys: keys.format in (InputFormat.auto, InputFormat.parquet)),
    ),
    # files that are named are taken whatever they are called
    "pattern": (Condition("inputs", lambda keys: any(Path(i).is_dir() for i in keys.inputs)),),
}
BOUNDS = {
    "eod_id": Bound(-INT32),
    "pad_id": Bound(-INT32),
    "align": Bound(-INT32),
    "workers": Bound(-INT32, 1024),
    "shard_bytes": Bound(-INT32, 2**62),
}


def options_of(keys: Keys) -> PreprocessOptions:
    """Return the keys as the package takes them."""
    values = vars(keys) | {"inputs": tuple(keys.inputs)}
    name = values.pop("tokenizer")
    if name != "bytes":
        folder = str(Path(name).expanduser())
        values |= {"tokenizer_kind": "huggingface", "tokenizer_name": folder}
    return PreprocessOptions(**values)


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
    """Return the closing lines."""
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


def run(keys: Keys) -> int:
    """Write the dataset and report; 1 where it stopped and can continue."""
    options = options_of(keys)
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


COMMAND = Command(Keys, run, bounds=BOUNDS, effects=EFFECTS, files="inputs")


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, or 2 for a mistake, which takes one line."""
    return run_command(arguments, COMMAND, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
