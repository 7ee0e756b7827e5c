"""Small corpora and tokenizers that the tests of this folder share."""

import json
from pathlib import Path

import numpy as np
import tokenizers

from megatron_ttt.data.indexed import IndexedWriter

WORDS = [
    "the file ",
    "def read(",
    "self, ",
    "path): ",
    "return ",
    "世界 ",
    "naïve ",
    "x" * 37,
    "\n",
]


def make_text(seed: int, length: int = 12) -> str:
    """A reproducible text of ``length`` words, several bytes per character now and then."""
    generator = np.random.default_rng(seed)
    return "".join(WORDS[i] for i in generator.integers(len(WORDS), size=length)) + f"#{seed}"


def save_tokenizer(
    folder: Path,
    *,
    eos_token: str | None = "<|end|>",
    pad_token: str | None = None,
    merges: int = 60,
    template: str | None = None,
    bos_token: str | None = None,
    add_bos_token: bool | None = None,
) -> str:
    """A byte-level BPE trained on the spot; ids 0, 1, 2: ``<|end|>``, ``<|pad|>``, ``<|begin|>``.

    :param template: what the tokenizer adds to a text, as ``<|begin|> $A``; with it, or with
        ``bos_token``, the third mark is one.
    """
    marks = ["<|end|>", "<|pad|>", *(["<|begin|>"] if template or bos_token else [])]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=marks,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(i, 40) for i in range(20)], trainer)
    if template is not None:
        processors = tokenizers.processors
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=template, special_tokens=[(mark, id) for id, mark in enumerate(marks)]
                ),
            ]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": eos_token,
        "pad_token": pad_token,
        "bos_token": bos_token,
        "add_bos_token": add_bos_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return str(folder)


def store_truncation(folder: str, *, direction: str = "right", pad_to: int | None = None) -> None:
    """What ``transformers`` leaves in the file after a call with ``truncation=True``."""
    path = str(Path(folder) / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.enable_truncation(9, stride=2, direction=direction)
    if pad_to is not None:
        backend.enable_padding(length=pad_to, pad_id=1, pad_token="<|pad|>")
    backend.save(path)


def write_dataset(prefix: Path, documents: list[list[int]]) -> str:
    """A dataset without a sidecar."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add(np.asarray(document))
    return str(prefix)
