#!/usr/bin/env python3
"""Folds a text into the weights of a plain checkpoint, which any engine serves.

python tools/bake.py exported/ baked/ --read book.txt
python tools/bake.py exported/ baked/ --read book.txt ttt.decay=0.9
python tools/bake.py exported/ baked/ --memory book.memory --probe questions.txt
python tools/bake.py outputs/demo baked/ --read book.txt
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from megatron_ttt.checkpoints.run_files import checkpoint_folder
from megatron_ttt.config.arguments import WHOLE, OneLineParser, tell
from megatron_ttt.config.launcher import one_process
from megatron_ttt.config.reading import RULE_KEYS, ReadingRule, set_rule_key
from megatron_ttt.config.schema import Bos
from megatron_ttt.data.inputs import read_text
from megatron_ttt.data.tokenizers import ModelTokenizer, Tokenizer
from megatron_ttt.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from megatron_ttt.inference.baking import BakeReport, Distance

EXPORTED = ".exported"  # beside the destination, while a Megatron checkpoint is baked


def parser() -> OneLineParser:
    made = OneLineParser(
        prog="bake.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("model", type=Path, help="an exported model, a Megatron checkpoint, or a run")
    add("destination", type=Path, help="folder of the plain checkpoint; must not exist")
    keys = ", ".join(f"{key}=..." for key in RULE_KEYS)
    add("overrides", nargs="*", metavar="KEY=VALUE", help=f"another update rule: {keys}")
    add("--read", type=Path, metavar="FILE", help="the text")
    add("--memory", type=Path, metavar="FILE", help="start from a saved memory")
    add("--probe", type=Path, metavar="FILE", help="compared on (default: the text's end)")
    add("--probe-tokens", type=WHOLE, default=256, metavar="N", help="of it (default: 256)")
    add("--tokenizer", metavar="NAME", help="bytes, a folder or a name (default: the model's)")
    add(
        "--bos",
        choices=[choice.value for choice in Bos],
        help="before a text (default: as trained)",
    )
    add("--beyond-positions", choices=["refuse", "allow"], default="refuse")
    add("--device", metavar="NAME", help="default: a GPU if there is one")
    return made


@contextmanager
def exported(model: Path, destination: Path) -> Iterator[tuple[Path, ModelTokenizer | None]]:
    """A Hugging Face folder of the model, and its tokenizer where only Megatron's names it.

    A Megatron checkpoint is exported beside the destination for as long as this lasts.

    Raises:
        ValueError: the folder holds no model or is damaged, or the place beside is taken.
    """
    if (model / "config.json").is_file():
        yield model, None
        return
    if not (model / "metadata.json").is_file():
        raise ValueError(
            f"{model}: neither config.json nor metadata.json: this is no model's folder"
        )
    folder = destination.with_name(destination.name + EXPORTED)
    if folder.exists():  # somebody's own: neither written into nor removed at the end
        raise ValueError(f"{folder}: exists, and is needed for as long as this lasts")
    from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
    from megatron_ttt.conversion.exporting import HFView, Style, export_checkpoint
    from megatron_ttt.conversion.manifest import described_model, origin
    from megatron_ttt.inference.megatron_backend import model_tokenizer

    source = MegatronFolder(model)
    try:
        export_checkpoint(
            HFView(source, *described_model(source)),
            folder,
            companions_from=origin(source),
            style=Style.package,
            report=lambda name, size: None,
        )
        yield folder, model_tokenizer(source)
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


def rule_of(words: list[str]) -> ReadingRule:
    """
    Raises:
        ValueError: a key or value that means nothing here; one line.
    """
    rule = ReadingRule()
    for word in words:
        key, _, value = word.partition("=")
        if key not in RULE_KEYS:
            raise ValueError(f"{word}: valid are {', '.join(RULE_KEYS)}")
        set_rule_key(rule, key, value)
    return rule


def check(options: argparse.Namespace) -> None:
    """What needs no model.

    Raises:
        ValueError: in one line.
    """
    one_process("a model is baked")
    if options.read is None and options.memory is None:
        raise ValueError("there is nothing to fold: give --read or --memory")
    if options.read is None and options.probe is None:
        raise ValueError("--memory alone: give --probe, a text to compare on")
    if options.probe_tokens < 1:
        raise ValueError(f"--probe-tokens {options.probe_tokens}: must be at least 1")
    if options.destination.exists():
        raise ValueError(f"{options.destination}: exists")


def run(options: argparse.Namespace, folder: Path, known: ModelTokenizer | None) -> "BakeReport":
    """
    Raises:
        ValueError: in one line.
    """
    import torch

    from megatron_ttt.inference.baking import bake
    from megatron_ttt.inference.transformers_backend import TransformersBackend

    device = torch.device(options.device) if options.device else None
    backend = TransformersBackend(folder, device=device, rule=rule_of(options.overrides))
    if not backend.fast_weights:
        raise ValueError(f"{options.model}: has no fast weights to fold")
    bos = None if options.bos is None else Bos(options.bos)
    tokenizer = (known or backend.tokenizer).open(options.tokenizer, bos=bos)
    if tokenizer is None:
        raise ValueError(f"{options.model}: has no tokenizer: give --tokenizer")
    start = list(tokenizer.start)
    text = [] if options.read is None else tokens_of(options.read, tokenizer)
    tokens = start + text if text else []
    probe = text if options.probe is None else tokens_of(options.probe, tokenizer)
    count = max(1, options.probe_tokens - len(start))
    probe = start + (probe[-count:] if options.probe is None else probe[:count])
    longest = max(len(tokens), len(probe))
    if options.beyond_positions == "refuse" and longest > backend.max_positions:
        raise ValueError(
            f"{longest} tokens, but the model has {backend.max_positions} positions "
            "(--beyond-positions=allow reads on regardless)"
        )
    largest = max([*tokens, *probe])
    if largest >= backend.vocab_size:
        raise ValueError(f"the tokenizer gives id {largest}, the model has {backend.vocab_size}")
    return bake(backend, folder, options.destination, tokens, probe, memory=options.memory)


def show(report: "BakeReport", destination: Path) -> None:
    """What a person wants to know of a baked model."""

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


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 2 for a mistake, which takes one line."""
    options = parser().parse_intermixed_args(arguments)
    options.model = checkpoint_folder(options.model)
    quiet_libraries()
    try:
        check(options)
        with exported(options.model, options.destination) as (folder, tokenizer):
            report = run(options, folder, tokenizer)
    except ValueError as error:
        return tell(error, mark_faults="error: ")
    show(report, options.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
