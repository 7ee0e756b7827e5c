"""What tells one run's texts from another's, cheaply: kept in checkpoints, compared on resume."""

import hashlib
from pathlib import Path
from typing import Any

from megatron_ttt.data.checks import DatasetFacts
from megatron_ttt.data.indexed import bin_path
from megatron_ttt.data.sources import Source

WHOLE_BYTES = 16 << 20  # a .bin up to this size is read whole, of a larger one this much
_PIECES = 256
# A file that moved, or a tokenizer that is known under another name, is the same.
_NAMES = ("prefix", "name")


def fingerprint(source: Source) -> dict[str, Any]:
    """JSON values: the tokenizer, and of every dataset its share, lengths and (sampled) tokens.

    Raises:
        OSError: a .bin cannot be read.
    """
    return {
        "tokenizer": source.tokenizer.as_dict(),
        "datasets": [_dataset(facts, share) for facts, share in source.parts],
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase for each difference; facts that only one side has recorded are not compared."""
    found = _differing("tokenizer", before.get("tokenizer"), now["tokenizer"])
    old, new = before.get("datasets", []), now["datasets"]
    if len(old) != len(new):
        found.append(f"datasets: {len(old)} then, {len(new)} now")
        return found
    for was, dataset in zip(old, new, strict=True):
        found += _differing(dataset["prefix"], was, dataset)
    return found


def content_digest(path: Path) -> str:
    """SHA-256 of a file up to :data:`WHOLE_BYTES`; of a larger one, pieces spread over it."""
    size = path.stat().st_size
    piece = WHOLE_BYTES // _PIECES
    starts = (
        [0]
        if size <= WHOLE_BYTES
        else [(size - piece) * i // (_PIECES - 1) for i in range(_PIECES)]
    )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(WHOLE_BYTES if len(starts) == 1 else piece))
    return digest.hexdigest()


def _dataset(facts: DatasetFacts, share: float) -> dict[str, Any]:
    return {
        "prefix": facts.prefix,
        "share": round(share, 12),
        "dtype": facts.dtype,
        "documents": facts.documents,
        "tokens": facts.tokens,
        "lengths": f"{facts.lengths_crc32:08x}",
        "content": content_digest(bin_path(facts.prefix)),
    }


def _differing(what: str, before: Any, now: dict[str, Any]) -> list[str]:
    if not isinstance(before, dict):
        return []
    parts = [
        f"{key} {_brief(before[key])} then, {_brief(now[key])} now"
        for key in now
        if key in before and key not in _NAMES and before[key] != now[key]
    ]
    return [f"{what}: {', '.join(parts)}"] if parts else []


def _brief(value: Any) -> str:
    """Digests are only compared: eight characters tell them apart."""
    text = "none" if value is None else str(value)
    return text[:8] if len(text) == hashlib.sha256().digest_size * 2 else text
