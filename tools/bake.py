#!/usr/bin/env python3
"""Folds a text into the weights of a plain checkpoint, which any engine serves.

python tools/bake.py checkpoint=exported output=baked read=book.txt
python tools/bake.py checkpoint=exported output=baked read=book.txt ttt.decay=0.9
python tools/bake.py checkpoint=exported output=baked memory=book.memory probe=questions.txt
python tools/bake.py checkpoint=outputs/demo output=baked read=book.txt
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING
from rich.console import Console

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.config.command import Command, run_command
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.reading import ReadingMode, ReadingRule, rule_faults
from megatron_ttt.config.schema import Bos
from megatron_ttt.data.inputs import read_text
from megatron_ttt.data.tokenizers import ModelTokenizer, Tokenizer
from megatron_ttt.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from megatron_ttt.inference.baking import BakeReport, Distance

EXPORTED = ".exported"  # beside the output, while a Megatron checkpoint is baked


@dataclass
class Keys:
    """Read a text and fold the fast weights into W0."""

    checkpoint: Path = MISSING  # an exported model, a Megatron checkpoint, or a run
    output: Path = MISSING  # folder of the plain checkpoint; must not exist
    read: Path | None = None  # file with the text
    memory: Path | None = None  # file; start from its fast weights
    probe: Path | None = None  # file that is compared on; null: the text's end
    probe_tokens: int = 256  # tokens of it
    tokenizer: str | None = None  # bytes, a folder or a name; null: the model's
    bos: Bos | None = None  # before a text; null: as in training
    beyond_positions: bool = False  # read more tokens than the model has positions
    device: str | None = None  # null: a GPU if there is one
    ttt: ReadingRule = field(default_factory=ReadingRule)


@contextmanager
def exported(model: Path, destination: Path) -> Iterator[tuple[Path, ModelTokenizer | None]]:
    """Yield a Hugging Face folder of the model, and the tokenizer that Megatron's names.

    A Megatron checkpoint is exported beside the destination for as long as this lasts.

    Raises:
        ValueError: the folder holds no model or is damaged, or the place beside is taken.
    """
    from megatron_ttt.conversion.opened import find_folder, open_checkpoint

    model, is_exported = find_folder(model)
    if is_exported:
        yield model, None
        return
    folder = destination.with_name(destination.name + EXPORTED)
    if folder.exists():  # somebody's own: neither written into nor removed at the end
        raise ValueError(f"{folder}: exists, and is needed for as long as this lasts")
    from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
    from megatron_ttt.conversion.exporting import HFView, Style, export_checkpoint
    from megatron_ttt.conversion.manifest import described_model, origin

    source = MegatronFolder(model)
    try:
        export_checkpoint(
            HFView(source, *described_model(source)),
            folder,
            companions_from=origin(source),
            style=Style.package,
            report=lambda name, size: None,
        )
        yield folder, open_checkpoint(model).tokenizer()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tokens_of(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Of the text alone, without what stands before it.

    Raises:
        ValueError: the file cannot be read, is not text, or is empty.
    """
    tokens = tokenizer.encode(read_text(path))
    if not tokens:
        raise ValueError(f"{path}: the text is empty")
    return tokens


def check(keys: Keys) -> None:
    """Raise for what can be refused without a model.

    Raises:
        ValueError: in one line.
    """
    if faults := list(rule_faults(keys.ttt)):
        raise ConfigError(faults)
    if keys.ttt.mode is ReadingMode.off:
        raise ConfigError([Fault("ttt.mode", keys.ttt.mode, "leaves nothing to fold")])
    if keys.read is None and keys.memory is None:
        raise ValueError("there is nothing to fold: give read= or memory=")
    if keys.read is None and keys.probe is None:
        raise ValueError("memory alone: give probe=, a text to compare on")
    if keys.output.exists():
        raise ConfigError([Fault("output", keys.output, "exists")])


def baked(keys: Keys, folder: Path, known: ModelTokenizer | None) -> "BakeReport":
    """Read and fold.

    Raises:
        ValueError: in one line.
    """
    import torch

    from megatron_ttt.inference.baking import bake
    from megatron_ttt.inference.transformers_backend import TransformersBackend

    device = torch.device(keys.device) if keys.device else None
    backend = TransformersBackend(folder, device=device, rule=keys.ttt)
    if not backend.fast_weights:
        raise ValueError(f"{keys.checkpoint}: has no fast weights to fold")
    tokenizer = (known or backend.tokenizer).open(keys.tokenizer, bos=keys.bos)
    if tokenizer is None:
        raise ValueError(f"{keys.checkpoint}: has no tokenizer: give tokenizer=")
    start = list(tokenizer.start)
    text = [] if keys.read is None else tokens_of(keys.read, tokenizer)
    tokens = start + text if text else []
    probe = text if keys.probe is None else tokens_of(keys.probe, tokenizer)
    count = max(1, keys.probe_tokens - len(start))
    probe = start + (probe[-count:] if keys.probe is None else probe[:count])
    longest = max(len(tokens), len(probe))
    if not keys.beyond_positions and longest > backend.max_positions:
        raise ValueError(
            f"{longest} tokens, but the model has {backend.max_positions} positions "
            "(beyond_positions=true reads on regardless)"
        )
    largest = max([*tokens, *probe])
    if largest >= backend.vocab_size:
        raise ValueError(f"the tokenizer gives id {largest}, the model has {backend.vocab_size}")
    return bake(backend, folder, keys.output, tokens, probe, memory=keys.memory)


def show(report: "BakeReport", destination: Path) -> None:
    """Print what a person wants to know of a baked model."""

    def said(distance: "Distance") -> str:
        return f"logits {distance.largest:.1e} of the largest, KL {distance.divergence:.1e} nats"

    ratios = ", ".join(f"{layer}: {ratio:.3f}" for layer, ratio in report.update_ratios.items())
    print(f"read {report.tokens_read} tokens; update ratio by layer {ratios}")
    print(f"compared on {report.probe_tokens} tokens, from position 0:")
    print(f"  the same state, writing frozen   {said(report.frozen)} (rounding)")
    print(f"  the same state, writing on       {said(report.live)}")
    if report.losses["baked"] is not None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        print(f"  loss, nats a token: {losses}")
    Console().print(f"wrote {destination}", highlight=False, soft_wrap=True)


def run(keys: Keys) -> int:
    """Bake and print."""
    quiet_libraries()
    check(keys)
    with exported(keys.checkpoint, keys.output) as (folder, tokenizer):
        report = baked(keys, folder, tokenizer)
    show(report, keys.output)
    return 0


COMMAND = Command(
    Keys,
    run,
    bounds={"probe_tokens": COUNT},
    old={
        "--beyond-positions=allow": "beyond_positions=true",
        "--beyond-positions=refuse": "beyond_positions=false",
    },
    old_places=("checkpoint", "output"),
    alone="a model is baked",
)


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, or 2 for a mistake, which takes one line."""
    return run_command(arguments, COMMAND, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
