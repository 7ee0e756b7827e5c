"""From ``data.*`` of the configuration to checked datasets and what their token ids mean."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttt.config.schema import Bos, DataConfig, DataSource, TokenizerConfig
from megatron_ttt.data.checks import (
    DatasetFacts,
    check_indexed_dataset,
    check_token_range,
    scan_token_range,
)
from megatron_ttt.data.indexed import bin_path, sidecar_path, write_json
from megatron_ttt.data.python_stdlib import python_stdlib_corpus
from megatron_ttt.data.tokenizers import TokenizerIdentity, load_tokenizer

DEFAULT_CACHE_DIR = "outputs/cache"


@dataclass(frozen=True)
class Source:
    """Checked datasets with their shares, which sum to 1, and the tokenizer of all of them."""

    parts: tuple[tuple[DatasetFacts, float], ...]
    tokenizer: TokenizerIdentity


def cache_dir(data: DataConfig) -> str:
    return data.cache_dir if data.cache_dir is not None else DEFAULT_CACHE_DIR


def parse_path(path: Any) -> list[tuple[str, float | None]]:
    """``data.path``'s three forms, a prefix, a list, ``{prefix: weight}``, as (prefix, weight).

    Raises:
        ValueError: none given, a prefix twice, or a weight that is not a positive number.
    """
    pairs: list[tuple[Any, Any]]
    if isinstance(path, Mapping):
        pairs = list(path.items())
    elif isinstance(path, Sequence) and not isinstance(path, str):
        pairs = [(prefix, None) for prefix in path]
    else:
        pairs = [(path, None)]
    if not pairs or any(not isinstance(prefix, str) or not prefix for prefix, _ in pairs):
        raise ValueError(
            f"data.path={path!r}: give the prefix of a .bin/.idx pair, a list of prefixes, or"
            " {prefix: weight}"
        )
    prefixes = [prefix for prefix, _ in pairs]
    for prefix, weight in pairs:
        if prefixes.count(prefix) > 1:
            raise ValueError(f"data.path names {prefix} twice")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (number and 0 < weight < math.inf):
            raise ValueError(f"data.path gives {prefix} the weight {weight!r}, no positive number")
    return pairs


def open_source(
    data: DataConfig,
    *,
    vocab_size: int,
    is_builder: bool,
    barrier: Callable[[], None],
) -> Source:
    """Check every dataset of the configuration; build the generated corpus on first use.

    Without weights the shares follow the datasets' token counts. Every process calls this and
    meets the same errors; the one with ``is_builder`` does the work that is written to the cache.

    Raises:
        ValueError: a damaged or missing dataset, token ids beyond ``vocab_size``, datasets
            made with different tokenizers, or an unknown tokenizer.
    """
    if data.source is DataSource.python_stdlib:
        prefix = python_stdlib_corpus(cache_dir(data), is_builder=is_builder, barrier=barrier)
        pairs: list[tuple[str, float | None]] = [(prefix, None)]
    else:
        pairs = parse_path(data.path)
    all_facts = [check_indexed_dataset(prefix) for prefix, _ in pairs]
    _check_vocabulary(all_facts, data, vocab_size, is_builder, barrier)
    weights = [
        float(weight) if weight is not None else float(facts.tokens)
        for facts, (_, weight) in zip(all_facts, pairs, strict=True)
    ]
    shares = [weight / sum(weights) for weight in weights]
    return Source(
        parts=tuple(zip(all_facts, shares, strict=True)),
        tokenizer=_common_tokenizer(all_facts, data.tokenizer),
    )


def _common_tokenizer(
    all_facts: Sequence[DatasetFacts], config: TokenizerConfig
) -> TokenizerIdentity:
    """Return the sidecars' tokenizer; for datasets without a sidecar the configured one."""
    known: list[tuple[str, TokenizerIdentity]] = []
    for facts in all_facts:
        if facts.sidecar is not None:
            known.append((facts.prefix, facts.sidecar.tokenizer))
    if len(known) < len(all_facts):
        facts_of_bare = next(facts for facts in all_facts if facts.sidecar is None)
        bare = facts_of_bare.prefix
        try:
            identity = _identity_without_sidecar(facts_of_bare, config)
        except ValueError as error:
            raise ValueError(
                f"{sidecar_path(bare)} does not exist, so data.tokenizer has to say how documents"
                f" end: {error}"
            ) from error
        known.append((f"data.tokenizer (for {bare})", identity))
    first_name, first = known[0]
    for name, identity in known[1:]:
        if (identity.eod, identity.pad) != (first.eod, first.pad) or (
            identity.fingerprint != first.fingerprint
        ):
            raise ValueError(
                f"{name} and {first_name} were made with different tokenizers:"
                f" {_brief(identity)} and {_brief(first)}"
            )
        if identity.start != first.start:
            raise ValueError(
                f"documents of {name} begin with {_ids(identity.start)}, those of {first_name} with"
                f" {_ids(first.start)}: prepare them with one bos"
            )
    configured = config.kind.value
    if configured != first.kind and (configured == "bytes" or config.name):
        raise ValueError(
            f"data.tokenizer.kind={configured}, but {first_name} was made with {_brief(first)}"
        )
    _check_start(first_name, first, config)
    return first


def _identity_without_sidecar(facts: DatasetFacts, config: TokenizerConfig) -> TokenizerIdentity:
    """Return what the configuration says; whether documents have a start, their first one shows."""
    identity = load_tokenizer(
        config.kind.value, config.name, start=config.bos or Bos.model
    ).identity
    begins = np.fromfile(bin_path(facts.prefix), np.dtype(facts.dtype), len(identity.start))
    return identity if tuple(begins) == identity.start else replace(identity, start=())


def _check_start(prefix: str, identity: TokenizerIdentity, config: TokenizerConfig) -> None:
    """Check what documents begin with.

    Raises:
        ValueError: ``config`` says it, and these documents begin otherwise.
    """
    if config.bos is None:
        return
    name = config.name or identity.name
    wanted = load_tokenizer(identity.kind, name, start=config.bos).identity.start
    if wanted != identity.start:
        raise ValueError(
            f"bos={config.bos.value} means {_ids(wanted)} before a document, but those of {prefix}"
            f" begin with {_ids(identity.start)}: prepare them with bos={config.bos.value}, or"
            " leave the key out"
        )


def _ids(start: Sequence[int]) -> str:
    return f"the ids {list(start)}" if start else "no mark"


def _brief(identity: TokenizerIdentity) -> str:
    name = f" {identity.name}" if identity.name else ""
    return f"{identity.kind}{name} (end of document {identity.eod}, padding {identity.pad})"


def _check_vocabulary(
    all_facts: Sequence[DatasetFacts],
    data: DataConfig,
    vocab_size: int,
    is_builder: bool,
    barrier: Callable[[], None],
) -> None:
    """Sidecars say the largest id; datasets without one are read through once, and remembered."""
    bare = [facts for facts in all_facts if facts.sidecar is None]
    if bare:
        try:
            for facts in bare if is_builder else []:
                path = _range_path(facts, data)
                if not path.is_file():
                    low, high = scan_token_range(facts)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, {"prefix": facts.prefix, "low": low, "high": high})
        finally:
            barrier()
    for facts in all_facts:
        if facts.sidecar is not None:
            low, high = 0, facts.sidecar.max_token_id
        else:
            found = json.loads(_range_path(facts, data).read_text(encoding="utf-8"))
            low, high = found["low"], found["high"]
        check_token_range(facts, low, high, vocab_size=vocab_size)


def _range_path(facts: DatasetFacts, data: DataConfig) -> Path:
    """Where a scan is remembered; another .bin under the same name is another file."""
    path = bin_path(facts.prefix).resolve()
    key = f"{path} {facts.layout_key} {path.stat().st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(cache_dir(data)) / f"token-range-{digest}.json"
