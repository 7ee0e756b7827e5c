"""What types cannot say about the keys ``data.*``; see ``validate.py``."""

from collections.abc import Iterator
from typing import Any

from megatron_ttt.config.bounds import text_complaint
from megatron_ttt.config.faults import Fault
from megatron_ttt.config.schema import Config, DataSource, TokenizerKind

BYTE_TOKENS = 258  # 256 bytes, end of document, padding
_LARGEST_WEIGHT = 1e15


def data_faults(config: Config) -> Iterator[Fault]:
    """Yield the faults of one configuration."""
    data, vocabulary = config.data, config.model.vocab_size
    if data.tokenizer.kind is TokenizerKind.bytes and vocabulary < BYTE_TOKENS:
        yield Fault(
            "model.vocab_size",
            vocabulary,
            f"data.tokenizer.kind=bytes has {BYTE_TOKENS} tokens"
            " (256 bytes, end of document, padding)",
        )
    if (
        data.source is DataSource.python_stdlib
        and data.tokenizer.kind is TokenizerKind.huggingface
        and data.tokenizer.name is None
    ):
        yield Fault(
            "data.tokenizer.name",
            None,
            "data.tokenizer.kind=huggingface needs the name or the folder of a tokenizer"
            " (or data.tokenizer.kind=bytes)",
        )
    yield from _path_faults(data.path)
    if data.source is DataSource.files and data.path is None and not config.run.dry_run:
        yield Fault(
            "data.path",
            None,
            "name the corpus: data.path=PREFIX of a .bin/.idx pair from tools/preprocess_data.py"
            " (or data=python_stdlib)",
        )
    shares = data.split.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    counted = len(numbers) == 3 and all(0 <= number < 1e30 for number in numbers)
    if not counted or numbers[0] == 0:
        yield Fault(
            "data.split", data.split, "must be three shares train,validation,test such as 99,1,0"
        )
    elif config.validation.interval is not None and numbers[1] == 0:
        yield Fault(
            "data.split",
            data.split,
            f"leaves nothing to validate on, and validation.interval={config.validation.interval}",
        )


def _path_faults(path: Any) -> Iterator[Fault]:
    """Yield the forms of ``data.path``; what the prefixes name is looked at when the run starts."""
    if path is None:
        return
    prefixes = list(path) if isinstance(path, list | dict) else [path]
    weights = list(path.values()) if isinstance(path, dict) else []
    complaints = [text_complaint(item) if isinstance(item, str) else "" for item in prefixes]
    if not prefixes or "" in complaints:
        message = "must be the prefix of a .bin/.idx pair, a list of prefixes, or {prefix: weight}"
        yield Fault("data.path", path, message)
    elif isinstance(path, list | dict) and any(complaints):
        message = next(complaint for complaint in complaints if complaint)
        yield Fault("data.path", path, f"a prefix {message}")
    elif len(set(prefixes)) < len(prefixes):
        yield Fault("data.path", path, "names a prefix twice")
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 < weight <= _LARGEST_WEIGHT):
            message = f"a weight must be a number above 0 and at most {_LARGEST_WEIGHT:g}"
            yield Fault("data.path", path, message)
            break
