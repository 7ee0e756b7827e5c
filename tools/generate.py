#!/usr/bin/env python3
"""Generate text with an exported or a Megatron checkpoint, with fast weights or without.

python tools/generate.py checkpoint=exported prompt="Once upon a time" max_new_tokens=64
python tools/generate.py checkpoint=exported prompt="Once upon a time" ttt=off
python tools/generate.py checkpoint=exported read=book.txt ttt.clip.mode=relative ttt.clip.bound=0.1
python tools/generate.py checkpoint=exported read=book.txt max_new_tokens=0 save_memory=book.memory
python tools/generate.py checkpoint=exported memory=book.memory prompt="Who is the captain?"
python tools/generate.py checkpoint=exported session=talk.session prompt="And then?"
torchrun --nproc-per-node 2 tools/generate.py checkpoint=checkpoints/qwen3_4b parallel.tp=2 \\
    prompt="Hello"

Text goes to standard output as it is generated, everything else to standard error.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from megatron_ttt.config.bounds import COUNT, INT32, RANKS, SEED, Bound
from megatron_ttt.config.command import Command, run_command
from megatron_ttt.config.effects import Condition
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.launcher import launched
from megatron_ttt.config.reading import RULE_KEYS, ReadingMode, ReadingRule, rule_faults
from megatron_ttt.config.schema import Bos
from megatron_ttt.data.inputs import read_text
from megatron_ttt.data.tokenizers import Spelled, Tokenizer
from megatron_ttt.locks import Occupied, acquire

if TYPE_CHECKING:
    from megatron_ttt.inference.backend import Backend
    from megatron_ttt.inference.generation import Generated


class Rest(Enum):
    """What becomes of a memory's unfinished chunk."""

    flush = "flush"
    drop = "drop"


class Dtype(Enum):
    auto = "auto"
    bf16 = "bfloat16"
    fp16 = "float16"
    fp32 = "float32"


@dataclass
class Parallel:
    """Ranks of a Megatron checkpoint."""

    tp: int = 1  # ranks that share each layer
    cp: int = 1  # ranks that share the rows' tokens


@dataclass
class Keys:
    """Read a prompt and go on."""

    checkpoint: Path = MISSING  # an exported model, a Megatron checkpoint, or a run
    prompt: list[str] = field(default_factory=list)  # repeat it for a batch of rows
    prompt_file: Path | None = None  # a prompt as long as a file
    read: Path | None = None  # file that every row reads before its prompt
    tokenizer: str | None = None  # bytes, a folder or a name; null: the model's
    bos: Bos | None = None  # before a prompt; null: as in training
    special_tokens: Spelled = Spelled.characters  # as what those in a prompt are read
    max_new_tokens: int = 128  # after each prompt
    temperature: float = 0.0  # 0: the most likely token
    top_k: int | None = None  # tokens that are drawn from
    top_p: float | None = None  # share of the probability that is drawn from
    seed: int = 1234  # of the draws
    stop_token: list[int] | None = None  # ids that end a row; null: the model's
    session: Path | None = None  # file; continue it if it exists, save it at the end
    memory: Path | None = None  # file; start with its fast weights
    save_memory: Path | None = None  # file; save the fast weights at the end
    rest: Rest = Rest.flush  # the memory's unfinished chunk
    beyond_positions: bool = False  # read more tokens than the model has positions
    dtype: Dtype = Dtype.auto  # of an exported model
    device: str | None = None  # of an exported model; null: a GPU if there is one
    ttt: ReadingRule = field(default_factory=ReadingRule)
    parallel: Parallel = field(default_factory=Parallel)


BOUNDS = {
    "max_new_tokens": Bound(0),
    "temperature": Bound(0, 1e30),
    "top_k": COUNT,
    "top_p": Bound(0, 1, open=True, words="must lie in (0, 1]"),
    "seed": SEED,
    "stop_token": Bound(-INT32),
    "parallel.tp": RANKS,
    "parallel.cp": RANKS,
}
_SAMPLES = (Condition("temperature", lambda keys: keys.temperature > 0),)
_FAST = (Condition("ttt.mode", lambda keys: keys.ttt.mode is not ReadingMode.off),)
EFFECTS = {
    **dict.fromkeys(("top_k", "top_p", "seed"), _SAMPLES),
    **dict.fromkeys(RULE_KEYS, _FAST),
    "rest": (Condition("save_memory", lambda keys: keys.save_memory is not None),),
}


@contextmanager
def backend_of(keys: Keys) -> "Iterator[Backend[Any]]":
    """Load the model that the keys name.

    Raises:
        ValueError: the folder holds no model, or the ranks do not fit.
    """
    from megatron_ttt.conversion.opened import find_folder

    folder, is_exported = find_folder(keys.checkpoint)
    ranks = launched().world_size
    if not is_exported:
        needed = keys.parallel.tp * keys.parallel.cp
        if ranks != needed:
            sizes = f"parallel.tp={keys.parallel.tp} parallel.cp={keys.parallel.cp}"
            raise ValueError(f"{sizes}: needs {needed} ranks (torchrun), the job has {ranks}")
        from megatron_ttt.training.quiet import quiet_libraries

        quiet_libraries()
        from megatron_ttt.inference.megatron_backend import megatron_backend

        with megatron_backend(
            folder, tp=keys.parallel.tp, cp=keys.parallel.cp, rule=keys.ttt
        ) as backend:
            yield backend
    else:
        if ranks != 1 or keys.parallel.tp * keys.parallel.cp != 1:
            raise ValueError("an exported model is read by one process; ranks are for Megatron's")
        import torch

        from megatron_ttt.inference.transformers_backend import TransformersBackend

        name = keys.dtype.value
        yield TransformersBackend(
            folder,
            rule=keys.ttt,
            dtype=name if name == "auto" else getattr(torch, name),
            device=torch.device(keys.device) if keys.device else None,
        )


def tokenizer_of(keys: Keys, backend: "Backend[Any]") -> Tokenizer:
    """Open the model's tokenizer, or the one that is given.

    Raises:
        ValueError: there is none, or it cannot be loaded; one line.
    """
    tokenizer = backend.tokenizer.open(keys.tokenizer, bos=keys.bos, spelled=keys.special_tokens)
    if tokenizer is None:
        raise ValueError(f"{keys.checkpoint}: has no tokenizer: give tokenizer=")
    return tokenizer


def texts_of(keys: Keys) -> list[str]:
    """Each row's new text.

    Raises:
        ValueError: a file that cannot be read or is not text; one line.
    """
    texts = list(keys.prompt)
    if keys.prompt_file is not None:
        texts.append(read_text(keys.prompt_file))
    before = read_text(keys.read) if keys.read is not None else ""
    return [before + text for text in texts or [""]]


def warn_of_spelled(texts: list[str], tokenizer: Tokenizer) -> None:
    """Say which special tokens were spelled out and read as something else."""
    found = sorted({mark for text in texts for mark in tokenizer.spelled(text)})
    if found:
        print(
            f"{', '.join(found)}: read as ordinary characters (special_tokens=tokens reads them"
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


def check_positions(keys: Keys, backend: "Backend[Any]", last: int) -> None:
    """Check that the model has positions for everything that is asked for.

    Raises:
        ValueError: positions that the model was not made for, and nobody said they may be used.
    """
    if not keys.beyond_positions and last > backend.max_positions:
        raise ValueError(
            f"{last} tokens with the new ones, but the model has {backend.max_positions} positions "
            "(beyond_positions=true reads on regardless)"
        )


def generate_text(keys: Keys, backend: "Backend[Any]") -> None:
    """Read, generate, save.

    Args:
        keys: the command line.
        backend: the model.

    Raises:
        ValueError: with one line for the user.
    """
    from megatron_ttt.inference.backend import Turn
    from megatron_ttt.inference.fast_weight_state import Unfinished
    from megatron_ttt.inference.generation import generate
    from megatron_ttt.inference.sampling import Sampler, Sampling

    tokenizer = tokenizer_of(keys, backend)
    sampler = Sampler(Sampling(keys.temperature, keys.top_k, keys.top_p, keys.seed))
    texts = texts_of(keys)
    if backend.speaks and keys.special_tokens is Spelled.characters:
        warn_of_spelled(texts, tokenizer)
    rows = [tokenizer.encode_prompt(text) if text else [] for text in texts]
    if keys.session is not None and backend.has_session(keys.session):
        if keys.memory is not None:
            raise ValueError("session and memory: a session that exists has its own fast weights")
        reader, turn = backend.load_session(keys.session)
        if len(turn.unread) != len(rows):
            raise ValueError(f"{keys.session}: has {len(turn.unread)} rows, not {len(rows)}")
        sampler.generator.set_state(turn.generator)
        new = [tokenizer.encode(text) for text in texts]  # a session has begun before
        rows = [unread + row for unread, row in zip(turn.unread, new, strict=True)]
    elif keys.memory is not None:
        reader = backend.load_memory(keys.memory, len(rows))
    else:
        reader = backend.new_reader(len(rows))
    if any(not row for row in rows):
        raise ValueError("the prompt is empty: give prompt=, prompt_file= or read=")
    largest = max(max(row) for row in rows)
    if largest >= backend.vocab_size:
        raise ValueError(f"the tokenizer gives id {largest}, the model has {backend.vocab_size}")
    longest = max(place + len(row) for place, row in zip(reader.places, rows, strict=True))
    check_positions(keys, backend, longest + keys.max_new_tokens)
    stop = frozenset(keys.stop_token or []) or backend.stop_tokens or {tokenizer.eod}
    printer = Printer(tokenizer, rows=len(rows), speaks=backend.speaks)
    result = generate(
        reader,
        rows,
        sampler=sampler,
        max_new_tokens=keys.max_new_tokens,
        stop_tokens=stop,
        on_tokens=printer.on_tokens,
    )
    printer.finish(result)
    if keys.session is not None:
        backend.save_session(keys.session, reader, Turn.after(result.unread, sampler))
    if keys.save_memory is not None:
        backend.save_memory(keys.save_memory, reader, Unfinished(keys.rest.value))


@contextmanager
def session_held(session: Path | None) -> Iterator[None]:
    """Be the only one that continues a session: the later of two would undo the earlier.

    Raises:
        ValueError: another process continues it, or its folder cannot be written.
    """
    if session is None:
        yield
        return
    path = session.with_name(f"{session.name}.{launched().rank}.lock")
    try:
        lock = acquire(path, lambda line: print(line, file=sys.stderr))
    except Occupied as error:
        raise ValueError(f"session={session}: {error}") from error
    except OSError as error:
        raise ValueError(f"session={session}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def run(keys: Keys) -> int:
    """Open the model, read, generate, save."""
    if faults := list(rule_faults(keys.ttt)):
        raise ConfigError(faults)
    with session_held(keys.session), backend_of(keys) as backend:
        generate_text(keys, backend)
    return 0


COMMAND = Command(
    Keys,
    run,
    bounds=BOUNDS,
    effects=EFFECTS,
    old={
        "--beyond-positions=allow": "beyond_positions=true",
        "--beyond-positions=refuse": "beyond_positions=false",
    },
    old_places=("checkpoint",),
)


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, or 2 for a mistake, which takes one line."""
    return run_command(arguments, COMMAND, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
