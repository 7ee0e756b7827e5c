#!/usr/bin/env python3
"""Generates text with an exported or a Megatron checkpoint, with fast weights or without.

python tools/generate.py exported --prompt "Once upon a time" --max-new-tokens 64
python tools/generate.py exported --prompt "Once upon a time" ttt=off
python tools/generate.py exported --read book.txt ttt.clip.mode=relative ttt.clip.bound=0.1
python tools/generate.py exported --read book.txt --max-new-tokens 0 --save-memory book.memory
python tools/generate.py exported --memory book.memory --prompt "Who is the captain?"
python tools/generate.py exported --session talk.session --prompt "And then?"
torchrun --nproc-per-node 2 tools/generate.py checkpoints/qwen3_4b parallel.tp=2 --prompt "Hello"

Text goes to standard output as it is generated, everything else to standard error.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ttt.config.arguments import (
    SEED_NUMBER,
    WHOLE,
    FlagCondition,
    OneLineParser,
    bounded,
    flag_notices,
    tell,
)
from megatron_ttt.config.bounds import Bound
from megatron_ttt.config.launcher import launched
from megatron_ttt.config.reading import (
    RULE_KEYS,
    ReadingMode,
    ReadingRule,
    rule_faults,
    set_keys,
    set_rule_key,
)
from megatron_ttt.config.schema import Bos
from megatron_ttt.data.inputs import read_text
from megatron_ttt.data.tokenizers import Spelled, Tokenizer
from megatron_ttt.locks import Occupied, acquire
from megatron_ttt.training.checkpoint_files import checkpoint_folder

if TYPE_CHECKING:
    from megatron_ttt.inference.backend import Backend
    from megatron_ttt.inference.generation import Generated

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


_SAMPLES = FlagCondition(lambda given: given.temperature > 0, "with --temperature 0")
FLAGS = {
    "--top-k": _SAMPLES,
    "--top-p": _SAMPLES,
    "--seed": _SAMPLES,
    "--rest": FlagCondition(lambda given: given.save_memory is not None, "without --save-memory"),
}


class Mistake(ValueError):
    """Something the user can put right; the message is one line."""


@dataclass
class Overrides:
    """The few configuration keys that mean something here."""

    rule: ReadingRule = field(default_factory=ReadingRule)
    tp: int = 1
    cp: int = 1


def _valid() -> str:
    keys = ", ".join(f"{key}=..." for key in RULE_KEYS)
    return f"ttt=off, ttt=in_place, {keys}, parallel.tp=N, parallel.cp=N"


def parser() -> OneLineParser:
    made = OneLineParser(
        prog="generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("model", type=Path, help="an exported model, a Megatron checkpoint, or a run")
    add("overrides", nargs="*", metavar="KEY=VALUE", help=_valid())
    add("--prompt", action="append", metavar="TEXT", help="repeat it for a batch of rows")
    add("--prompt-file", type=Path, metavar="FILE", help="a prompt as long as a file")
    add("--read", type=Path, metavar="FILE", help="text that every row reads before its prompt")
    add("--tokenizer", metavar="NAME", help="bytes, a folder or a name (default: the model's)")
    add(
        "--bos", choices=[choice.value for choice in Bos], help="before a prompt: docs/inference.md"
    )
    spelled = [choice.value for choice in Spelled]
    add("--special-tokens", choices=spelled, default="characters", help="spelled in a prompt")
    add("--max-new-tokens", type=WHOLE, default=128, metavar="N", help="default: 128")
    add(
        "--temperature",
        type=bounded(Bound(-1e30, 1e30), float),
        default=0.0,
        help="0 (default): the most likely token",
    )
    add("--top-k", type=WHOLE, metavar="K")
    add("--top-p", type=bounded(Bound(-1, 1e6), float), metavar="P")
    add("--seed", type=SEED_NUMBER, default=1234)
    add("--stop-token", type=WHOLE, action="append", metavar="ID", help="default: the model's")
    add("--session", type=Path, metavar="FILE", help="continue it if it exists; save it at the end")
    add("--memory", type=Path, metavar="FILE", help="start with the fast weights of a memory")
    add("--save-memory", type=Path, metavar="FILE", help="save the fast weights at the end")
    add("--rest", choices=["flush", "drop"], default="flush", help="the memory's unfinished chunk")
    add("--beyond-positions", choices=["refuse", "allow"], default="refuse")
    add("--dtype", choices=DTYPES, default="auto", help="of an exported model")
    add("--device", metavar="NAME", help="of an exported model (default: a GPU if there is one)")
    return made


def parse_overrides(words: list[str]) -> Overrides:
    """
    Raises:
        Mistake: a key or value that means nothing here.
        ConfigError: a value that the key cannot have.
    """
    found = Overrides()
    for word in words:
        key, _, value = word.partition("=")
        if key in ("ttt", "ttt.mode") and value in ("off", "in_place"):
            found.rule.mode = ReadingMode[value]
        elif key in RULE_KEYS:
            set_rule_key(found.rule, key, value)
        elif key in ("parallel.tp", "parallel.cp") and value.isdigit() and int(value) > 0:
            setattr(found, key.removeprefix("parallel."), int(value))
        else:
            raise Mistake(f"{word}: valid are {_valid()}")
    for fault in rule_faults(found.rule):
        raise Mistake(fault.line())
    return found


def idle(made: OneLineParser, options: argparse.Namespace, rule: ReadingRule) -> list[str]:
    """One line for each flag that has no effect, and each key of the rule beside ``ttt=off``."""
    keys = [key for key, _ in set_keys(rule)] if rule.mode is ReadingMode.off else []
    notices = flag_notices(made, options, FLAGS)
    return notices + [f"notice: {key} has no effect with ttt=off" for key in keys]


@contextmanager
def backend_of(options: argparse.Namespace, overrides: Overrides) -> "Iterator[Backend[Any]]":
    """
    Raises:
        Mistake: the folder holds no model, or the ranks do not fit.
    """
    folder: Path = checkpoint_folder(options.model)
    ranks = launched().world_size
    if (folder / "metadata.json").is_file():
        needed = overrides.tp * overrides.cp
        if ranks != needed:
            sizes = f"parallel.tp={overrides.tp} parallel.cp={overrides.cp}"
            raise Mistake(f"{sizes}: needs {needed} ranks (torchrun), the job has {ranks}")
        from megatron_ttt.training.quiet import quiet_libraries

        quiet_libraries()
        from megatron_ttt.inference.megatron_backend import megatron_backend

        with megatron_backend(
            folder, tp=overrides.tp, cp=overrides.cp, rule=overrides.rule
        ) as backend:
            yield backend
    elif (folder / "config.json").is_file():
        if ranks != 1 or overrides.tp * overrides.cp != 1:
            raise Mistake("an exported model is read by one process; ranks are for Megatron's")
        import torch

        from megatron_ttt.inference.transformers_backend import TransformersBackend

        name = DTYPES[options.dtype]
        yield TransformersBackend(
            folder,
            rule=overrides.rule,
            dtype=name if name == "auto" else getattr(torch, name),
            device=torch.device(options.device) if options.device else None,
        )
    else:
        raise Mistake(f"{folder}: neither config.json nor metadata.json: this is no model's folder")


def tokenizer_of(options: argparse.Namespace, backend: "Backend[Any]") -> Tokenizer:
    """
    Raises:
        ValueError: there is none, or it cannot be loaded; one line.
    """
    bos = None if options.bos is None else Bos(options.bos)
    spelled = Spelled(options.special_tokens)
    tokenizer = backend.tokenizer.open(options.tokenizer, bos=bos, spelled=spelled)
    if tokenizer is None:
        raise Mistake(f"{options.model}: has no tokenizer: give --tokenizer")
    return tokenizer


def texts_of(options: argparse.Namespace) -> list[str]:
    """Each row's new text.

    Raises:
        ValueError: a file that cannot be read or is not text; one line.
    """
    texts = list(options.prompt or [])
    if options.prompt_file is not None:
        texts.append(read_text(options.prompt_file))
    before = read_text(options.read) if options.read is not None else ""
    return [before + text for text in texts or [""]]


def warn_of_spelled(texts: list[str], tokenizer: Tokenizer) -> None:
    """Say which special tokens were spelled out and read as something else."""
    found = sorted({mark for text in texts for mark in tokenizer.spelled(text)})
    if found:
        print(
            f"{', '.join(found)}: read as ordinary characters (--special-tokens=tokens reads them"
            " as what they spell)",
            file=sys.stderr,
        )


class Printer:
    """Streams one row's text; several rows are printed whole at the end."""

    def __init__(self, tokenizer: Tokenizer, *, rows: int, speaks: bool) -> None:
        self.tokenizer, self.rows, self.speaks = tokenizer, rows, speaks
        self.ids: list[int] = []
        self.shown = ""

    def on_tokens(self, tokens: list[int | None]) -> None:
        if self.rows > 1 or not self.speaks or tokens[0] is None:
            return
        self.ids.append(tokens[0])
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # half of a character: wait for its other bytes
        print(text.removeprefix(self.shown), end="", flush=True)
        self.shown = text

    def finish(self, result: "Generated") -> None:
        if not self.speaks:
            return
        if self.rows == 1:
            print(self.tokenizer.decode(self.ids).removeprefix(self.shown), flush=True)
        else:
            for row, ids in enumerate(result.tokens):
                print(f"--- {row}\n{self.tokenizer.decode(ids)}")
        fed = sum(len(ids) for ids in result.tokens) - self.rows
        speed = f"{fed / result.decode_seconds:.1f} tokens/s" if fed > 0 else "no step"
        print(
            f"read {result.prompt_tokens} tokens at "
            f"{result.prompt_tokens / result.prompt_seconds:.1f} tokens/s, generated "
            f"{sum(len(ids) for ids in result.tokens)} at {speed}",
            file=sys.stderr,
        )


def check_positions(options: argparse.Namespace, backend: "Backend[Any]", last: int) -> None:
    """
    Raises:
        Mistake: positions that the model was not made for, and nobody said they may be used.
    """
    if options.beyond_positions == "refuse" and last > backend.max_positions:
        raise Mistake(
            f"{last} tokens with the new ones, but the model has {backend.max_positions} positions "
            "(--beyond-positions=allow reads on regardless)"
        )


def run(options: argparse.Namespace, backend: "Backend[Any]", notices: list[str]) -> None:
    """Read, generate, save.

    Args:
        options: the command line.
        backend: the model.
        notices: lines to say once no mistake has been found.

    Raises:
        ValueError: with one line for the user.
    """
    from megatron_ttt.inference.backend import Turn
    from megatron_ttt.inference.fast_weight_state import Unfinished
    from megatron_ttt.inference.generation import generate
    from megatron_ttt.inference.sampling import Sampler, Sampling

    tokenizer = tokenizer_of(options, backend)
    sampler = Sampler(Sampling(options.temperature, options.top_k, options.top_p, options.seed))
    texts = texts_of(options)
    if backend.speaks and options.special_tokens == Spelled.characters.value:
        warn_of_spelled(texts, tokenizer)
    rows = [tokenizer.encode_prompt(text) if text else [] for text in texts]
    if options.session is not None and backend.has_session(options.session):
        if options.memory is not None:
            raise Mistake("--session and --memory: a session that exists has its own fast weights")
        reader, turn = backend.load_session(options.session)
        if len(turn.unread) != len(rows):
            raise Mistake(f"{options.session}: has {len(turn.unread)} rows, not {len(rows)}")
        sampler.generator.set_state(turn.generator)
        new = [tokenizer.encode(text) for text in texts]  # a session has begun before
        rows = [unread + row for unread, row in zip(turn.unread, new, strict=True)]
    elif options.memory is not None:
        reader = backend.load_memory(options.memory, len(rows))
    else:
        reader = backend.new_reader(len(rows))
    if any(not row for row in rows):
        raise Mistake("the prompt is empty: give --prompt, --prompt-file or --read")
    largest = max(max(row) for row in rows)
    if largest >= backend.vocab_size:
        raise Mistake(f"the tokenizer gives id {largest}, the model has {backend.vocab_size}")
    longest = max(place + len(row) for place, row in zip(reader.places, rows, strict=True))
    check_positions(options, backend, longest + options.max_new_tokens)
    stop = frozenset(options.stop_token or []) or backend.stop_tokens or {tokenizer.eod}
    printer = Printer(tokenizer, rows=len(rows), speaks=backend.speaks)
    for notice in notices if backend.speaks else []:
        print(notice, file=sys.stderr)
    result = generate(
        reader,
        rows,
        sampler=sampler,
        max_new_tokens=options.max_new_tokens,
        stop_tokens=stop,
        on_tokens=printer.on_tokens,
    )
    printer.finish(result)
    if options.session is not None:
        backend.save_session(options.session, reader, Turn.after(result.unread, sampler))
    if options.save_memory is not None:
        backend.save_memory(options.save_memory, reader, Unfinished(options.rest))


@contextmanager
def session_held(session: Path | None) -> Iterator[None]:
    """Be the only one that continues a session: the later of two would undo the earlier.

    Raises:
        Mistake: another process continues it, or its folder cannot be written.
    """
    if session is None:
        yield
        return
    path = session.with_name(f"{session.name}.{launched().rank}.lock")
    try:
        lock = acquire(path, lambda line: print(line, file=sys.stderr))
    except Occupied as error:
        raise Mistake(f"--session {session}: {error}") from error
    except OSError as error:
        raise Mistake(f"--session {session}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 2 for a mistake, which takes one line."""
    made = parser()
    options = made.parse_intermixed_args(arguments)
    try:
        if options.max_new_tokens < 0:
            raise Mistake(f"--max-new-tokens {options.max_new_tokens}: is below 0")
        overrides = parse_overrides(options.overrides)
        notices = idle(made, options, overrides.rule)
        with session_held(options.session), backend_of(options, overrides) as backend:
            run(options, backend, notices)
    except ValueError as error:
        return tell(error, mark_faults="error: ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
