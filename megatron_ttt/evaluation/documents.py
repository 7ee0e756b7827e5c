"""Held-out text as rows of tokens: the starts of documents, or documents packed as in training.

Shape suffixes: B rows of a micro-batch, T tokens of a row, R = T + 1 (the last is only a label).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from omegaconf import OmegaConf
from torch import Tensor

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import DataConfig, DataSource
from megatron_ttt.data.checks import DatasetFacts
from megatron_ttt.data.datasets import split_range
from megatron_ttt.data.indexed import idx_path
from megatron_ttt.data.inputs import list_inputs
from megatron_ttt.data.readers import Damage, read_documents
from megatron_ttt.data.rows import Batch, make_batch
from megatron_ttt.data.sources import open_source
from megatron_ttt.data.tokenizers import Tokenizer, document_ids
from megatron_ttt.evaluation.schema import DataSplit, EvaluationData, RowKind
from megatron_ttt.evaluation.subject import Subject

_SPLITS = {
    DataSplit.train: Split.train,
    DataSplit.validation: Split.valid,
    DataSplit.test: Split.test,
}


@dataclass(frozen=True)
class TextRows:
    """Rows of text, equal on every rank.

    Attributes:
        tokens_NR: int64, the last token of a row is only a label.
        eod: the end-of-document token.
        pad: the token that fills places; ``None`` where there is none.
    """

    tokens_NR: Tensor
    eod: int
    pad: int | None

    def digest(self) -> str:
        """SHA-256 of everything above: equal if and only if the same text is read."""
        shape = "x".join(map(str, self.tokens_NR.shape))
        found = hashlib.sha256(f"{shape} tokens, eod {self.eod}, pad {self.pad}\n".encode())
        found.update(self.tokens_NR.contiguous().numpy().astype("<i8").tobytes())
        return found.hexdigest()


def held_out_rows(subject: Subject, data: EvaluationData, *, length: int, rows: int) -> TextRows:
    """Up to ``rows`` rows of whole text.

    Every rank calls this and gets the same rows. ``documents``: each row is the start of a
    document that is longer than it. ``packed``: the documents one after another, cut into rows.

    Args:
        subject: the model; its run's data are the default.
        data: which text.
        length: tokens of a row, T.
        rows: how many are wanted; text that has fewer gives fewer.

    Raises:
        ConfigError: the text cannot be read, or holds no row of that length.
    """
    try:
        if _names_files(data.path):
            tokenizer = subject.need_tokenizer()
            documents, eod, pad = _from_files(tokenizer, data), tokenizer.eod, tokenizer.pad
        else:
            documents, eod, pad = _from_indexed(subject, data, limit=length + 1)
        if data.rows is RowKind.packed:
            found, longest = _packed(documents, length=length, rows=rows, eod=eod)
        else:
            found, longest = _starts(documents, length=length, rows=rows)
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Fault("data.path", data.path, str(error).splitlines()[0])]) from error
    if not found:
        kind = "all documents together have" if data.rows is RowKind.packed else "the longest has"
        message = f"no text of {length + 1} tokens (data.rows={data.rows.name}): {kind} {longest}"
        raise ConfigError([Fault("data.path", data.path, message)])
    return TextRows(torch.stack(found), eod=eod, pad=pad)


def batches(text: TextRows, *, subject: Subject, batch_size: int) -> Iterator[Batch]:
    """Micro-batches of this data-parallel rank: every ``data_size``-th row, in order.

    ``sample_ids_B`` are the rows' numbers in ``text``. The last micro-batch may be smaller, and
    a rank may have fewer than another.
    """
    ranks, data = subject.ranks, subject.config.data
    mine = list(range(ranks.data_rank, len(text.tokens_NR), ranks.data_size))
    for first in range(0, len(mine), batch_size):
        numbers = mine[first : first + batch_size]
        yield make_batch(
            text.tokens_NR[numbers],
            numbers,
            eod=text.eod,
            pad=text.pad,
            mask_document_end=data.mask_document_end,
        )


def _names_files(path: Any) -> bool:
    """Whether ``data.path`` names text files or folders rather than .bin/.idx prefixes."""
    names = path if isinstance(path, list | tuple) else [path]
    return bool(names) and all(
        isinstance(name, str) and Path(name).exists() and not idx_path(name).exists()
        for name in names
    )


def _from_files(tokenizer: Tokenizer, data: EvaluationData) -> Iterator[Tensor]:
    """Documents of text, JSONL (key ``text``) and Parquet (column ``text``) files.

    Raises:
        ConfigError: shares are given, which files do not have.
        ValueError: a file is not what its name says, or holds a damaged document.
    """
    if data.shares is not None:
        message = "text files are read whole: leave it out, or give .bin/.idx prefixes"
        raise ConfigError([Fault("data.shares", data.shares, message)])
    names = data.path if isinstance(data.path, list | tuple) else [data.path]
    files = list_inputs(list(names), format=data.format, pattern=None, option="data.format=")
    for where, document in read_documents(files, json_key="text", column="text"):
        if document.text is not None:
            yield torch.from_numpy(document_ids(tokenizer, document.text))
        elif document.damage is not Damage.empty:
            assert document.damage is not None
            raise ValueError(f"{where} {document.damage.value}")


def _from_indexed(
    subject: Subject, data: EvaluationData, *, limit: int
) -> tuple[Iterator[Tensor], int, int | None]:
    """Documents of one split of .bin/.idx pairs, each cut at ``limit`` tokens."""
    config = _data_config(subject, data)
    source = open_source(
        config,
        vocab_size=subject.config.model.vocab_size,
        is_builder=subject.ranks.is_first,
        barrier=dist.barrier,
    )
    facts = [part for part, _ in source.parts]
    cut = None if data.rows is RowKind.packed else limit
    ranges = [_range(part, data.split, config.split) for part in facts]

    def documents() -> Iterator[Tensor]:
        for part, (first, last) in zip(facts, ranges, strict=True):
            dataset = IndexedDataset(part.prefix)
            for number in range(first, last):
                size = int(dataset.sequence_lengths[number])
                tokens = dataset.get(number, 0, size if cut is None else min(size, cut))
                yield torch.from_numpy(tokens.astype("int64"))

    return documents(), source.tokenizer.eod, source.tokenizer.pad


def _range(facts: DatasetFacts, split: DataSplit, shares: str) -> tuple[int, int]:
    if split is DataSplit.all:
        return 0, facts.documents
    return split_range(facts, shares, _SPLITS[split])


def _data_config(subject: Subject, data: EvaluationData) -> DataConfig:
    """Return the run's data with what ``data.*`` of the evaluation changes.

    Raises:
        ConfigError: there is neither a run that says what it read nor ``data.path``.
    """
    known = subject.source.trained.get("data", {})
    names = {field.name for field in fields(DataConfig)}
    schema = OmegaConf.structured(DataConfig)
    kept = {name: value for name, value in known.items() if name in names}
    config = OmegaConf.to_object(OmegaConf.merge(schema, kept))
    assert isinstance(config, DataConfig)
    if data.path is not None:
        config = replace(config, source=DataSource.files, path=data.path)
    elif not known or (config.source is DataSource.files and config.path is None):
        message = f"{subject.source.path} names no data of its own: give files, or .bin/.idx"
        raise ConfigError([Fault("data.path", None, message)])
    if data.bos is not None:
        config = replace(config, tokenizer=replace(config.tokenizer, bos=data.bos))
    if data.shares is not None:
        config = replace(config, split=data.shares)
    return config


def _starts(documents: Iterator[Tensor], *, length: int, rows: int) -> tuple[list[Tensor], int]:
    found: list[Tensor] = []
    longest = 0
    for tokens in documents:
        longest = max(longest, len(tokens))
        if len(tokens) > length:
            found.append(tokens[: length + 1])
            if len(found) == rows:
                break
    return found, longest


def _packed(
    documents: Iterator[Tensor], *, length: int, rows: int, eod: int
) -> tuple[list[Tensor], int]:
    """Rows of ``length`` inputs and one label, of which the label is the next row's first input."""
    wanted = rows * length + 1
    parts: list[Tensor] = []
    total = 0
    for tokens in documents:
        ended = len(tokens) > 0 and int(tokens[-1]) == eod
        parts.append(tokens if ended else torch.cat([tokens, tokens.new_tensor([eod])]))
        total += len(parts[-1])
        if total >= wanted:
            break
    stream = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    count = min(rows, max(total - 1, 0) // length)
    return [stream[row * length : (row + 1) * length + 1] for row in range(count)], total
