"""The rotary embedding of a ``config.json`` <-> :class:`RopeConfig`, as ``transformers`` reads it.

There are two spellings: ``rope_theta`` with ``rope_scaling`` (transformers 4), and everything in
``rope_parameters`` (5). Where both are written and say different things, the versions disagree
about which one counts, so that is refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_ttt.config.derived import attention_factor
from megatron_ttt.config.schema import RopeConfig, RopeScaling
from megatron_ttt.conversion.config_values import Values, as_real

DEFAULT_BASE = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_SPELLINGS = ("rope_scaling", "rope_parameters")
_COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_FIELDS = {
    RopeScaling.none: (),
    RopeScaling.llama3: (
        "factor",
        "original_max_positions",
        "low_freq_factor",
        "high_freq_factor",
    ),
    RopeScaling.yarn: ("factor", "original_max_positions", "beta_fast", "beta_slow"),
}


def rope_from_hf(values: Values, *, max_positions: int) -> RopeConfig:
    """Return the rotary embedding that a ``config.json`` describes; faults are noted in ``values``.

    Args:
        values: the whole file.
        max_positions: the scaled kinds stretch these where the original length is not written.
    """
    written = [spelling for spelling in _SPELLINGS if values.objects(spelling)]
    read = [_read(values, spelling, max_positions) for spelling in written or _SPELLINGS[:1]]
    if len(read) == 2 and not values.faults and read[0] != read[1]:
        values.fault("rope_scaling", "differs from rope_parameters: keep one of them")
    return read[0]


def rope_fields(scaling: RopeScaling) -> tuple[str, ...]:
    """Return the fields that have an effect beside ``base`` and ``scaling``."""
    return _FIELDS[scaling]


def scaling_keys(rope: RopeConfig) -> dict[str, Any] | None:
    """``rope_scaling`` of a ``config.json``; ``rope_theta`` stands beside it."""
    if rope.scaling is RopeScaling.none:
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling.value}
    for field in rope_fields(rope.scaling):
        name = _ORIGINAL if field == "original_max_positions" else field
        scaling[name] = getattr(rope, field)
    return scaling


def _read(values: Values, spelling: str, max_positions: int) -> RopeConfig:
    given = values.objects(spelling)
    inner = Values(given, f"{values.where}: {spelling}")
    rope = RopeConfig(base=_base(values, inner))
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    kind = inner.text("rope_type", "default")
    if "rope_type" not in given:
        kind = inner.text("type", "default")
    if nested:
        inner.fault(nested[0], "one rotary embedding for all layers is supported")
    elif kind in (RopeScaling.llama3.value, RopeScaling.yarn.value):
        rope = replace(rope, scaling=RopeScaling(kind))
        rope.original_max_positions = _original(values, inner, max_positions)
        (_read_llama3 if kind == "llama3" else _read_yarn)(inner, rope, max_positions)
    elif kind != "default":
        inner.fault("rope_type" if "rope_type" in given else "type", "known: default, llama3, yarn")
    if as_real(given.get("partial_rotary_factor", 1.0)) != 1.0:
        inner.fault("partial_rotary_factor", "must be 1.0")
    values.faults += inner.faults
    return rope


def _base(values: Values, inner: Values) -> float:
    """``rope_theta``, which may stand in either place."""
    bases = [
        place.number("rope_theta") for place in (inner, values) if "rope_theta" in place.content
    ]
    if len(bases) == 2 and bases[0] != bases[1]:
        inner.fault("rope_theta", f"the rope_theta outside is {bases[1]}: keep one of them")
    base = bases[0] if bases else DEFAULT_BASE
    if bases and base <= 1:
        (inner if "rope_theta" in inner.content else values).fault("rope_theta", "must be above 1")
        return DEFAULT_BASE
    return base


def _original(values: Values, inner: Values, max_positions: int) -> int:
    """Return the length before stretching, which may stand in either place too."""
    found: list[int] = [
        place.integer(_ORIGINAL) for place in (inner, values) if _ORIGINAL in place.content
    ]
    if len(found) == 2 and found[0] != found[1]:
        inner.fault(_ORIGINAL, f"the one outside is {found[1]}: keep one of them")
    return found[0] if found else max_positions


def _read_llama3(inner: Values, rope: RopeConfig, max_positions: int) -> None:
    rope.factor = inner.number("factor")
    rope.low_freq_factor = inner.number("low_freq_factor")
    rope.high_freq_factor = inner.number("high_freq_factor")
    if not inner.faults and rope.low_freq_factor == rope.high_freq_factor:
        inner.fault("high_freq_factor", "must differ from low_freq_factor")
    _refuse(inner, {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"})


def _read_yarn(inner: Values, rope: RopeConfig, max_positions: int) -> None:
    # transformers takes null as the ratio of the lengths, and 0 of a bound as its default.
    rope.factor = inner.number("factor", null=max_positions / rope.original_max_positions)
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        zero = as_real(inner.content.get(key)) == 0
        setattr(rope, key, default if zero else inner.number(key, default, null=default))
    if inner.content.get("truncate", True) is not True:
        inner.fault("truncate", "must be true")
    wanted, usual = _attention_factor(inner, rope), attention_factor(rope)
    if not inner.faults and not math.isclose(wanted, usual, rel_tol=1e-9):
        key = "mscale" if inner.content.get("attention_factor") is None else "attention_factor"
        inner.fault(key, f"only an attention factor of {usual}, 0.1 ln(factor) + 1, is supported")
    keys = ("attention_factor", "mscale", "mscale_all_dim", "truncate", "beta_fast", "beta_slow")
    _refuse(inner, {"factor", _ORIGINAL, *keys})


def _attention_factor(inner: Values, rope: RopeConfig) -> float:
    """Return what ``transformers`` multiplies queries and keys with."""
    if inner.content.get("attention_factor") is not None:
        return inner.number("attention_factor")
    scales = []
    for key in ("mscale", "mscale_all_dim"):
        zero = as_real(inner.content.get(key)) == 0
        scales.append(0.0 if zero else inner.number(key, 0.0, null=0.0))
    if not all(scales) or rope.factor <= 1:
        return attention_factor(rope)
    upper, lower = (0.1 * scale * math.log(rope.factor) + 1 for scale in scales)
    return upper / lower if lower else math.inf


def _refuse(inner: Values, known: set[str]) -> None:
    for key in _unknown(inner.content, known):
        inner.fault(key, "is not supported")


def _unknown(given: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    for key, value in given.items():
        if key not in known and key not in _COMMON and value is not None:
            yield key
