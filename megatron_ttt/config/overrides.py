"""Checks the words of a command line one by one, before Hydra composes them.

Hydra stops at the first mistake and names its own internals. Here every override is held against
the schema and the files of ``configs/``, so that each mistake becomes a :class:`Fault` that names
the key, the value and what would be valid.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ttt.config.faults import Fault, suggest
from megatron_ttt.config.schema import HF_SCHEME, Config

# Groups without a default: what a command line appends.
APPENDED = ("model", "experiment", "ablation")


def names_checkpoint(word: str) -> bool:
    """Whether a word names a checkpoint as the model: ``+model=hf:FOLDER``, or any other folder."""
    key, _, name = word.partition("=")
    return key in ("+model", "model") and (name.startswith(HF_SCHEME) or "/" in name)


def group_options(config_dir: Path) -> dict[str, list[str]]:
    """Return the groups of a configuration folder with the names of their files, both sorted."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(config_dir.iterdir())
        if folder.is_dir()
    }


def check_overrides(
    words: Sequence[str],
    groups: dict[str, list[str]],
    *,
    schema: type = Config,
    sweep: bool = False,
) -> list[Fault]:
    """Faults of the command line's overrides, in its order.

    Args:
        words: ``key=value``, ``+group=option`` and so on, as typed.
        groups: of files that can be chosen, with their names (:func:`group_options`).
        schema: the dataclass that owns the keys.
        sweep: several values per key (``key=1,2``) are wanted.
    """
    parser = OverridesParser.create()
    overrides, faults = [], []
    for word in words:
        try:
            overrides.append(parser.parse_override(word))
        except HydraException:
            key, _, value = word.partition("=")
            faults.append(
                Fault(
                    key,
                    value,
                    "cannot be read; write key=value, strings with odd"
                    " characters in quotes: 'key=\"a b\"'",
                )
            )
    chosen = {override.key_or_group for override in overrides}
    for override in overrides:
        if override.is_sweep_override() and not sweep:
            text = str(override.get_value_string())
            faults.append(
                Fault(
                    override.key_or_group,
                    text,
                    f"one value is wanted; a list is written [{text}], a sweep needs --multirun",
                )
            )
        elif override.key_or_group in groups:
            faults += _group_faults(override, groups, chosen)
        elif not override.is_sweep_override() and not override.key_or_group.startswith("hydra"):
            faults += _key_faults(override, groups, schema)
    return faults


def as_typed(words: Sequence[str], schema: type) -> list[str]:
    """Return the words, with quotes around numbers and switches that are given to keys of text.

    Hydra reads ``run.name=1e3`` as a number, and its text would be ``1000.0``; ``run.resume=no``
    as ``false``.

    Args:
        words: of which :func:`check_overrides` found no fault.
        schema: as there.
    """
    parser = OverridesParser.create()
    quoted = []
    for word in words:
        override = parser.parse_override(word)
        sweeps = override.is_choice_sweep()
        values = list(override.sweep_iterator()) if sweeps else [override.value()]
        key, _, text = word.partition("=")
        parts = text.split(",") if sweeps else [text]
        # texts with commas of their own are in quotes already
        if text and len(parts) == len(values) and _takes_text(override.key_or_group, schema):
            parts = [
                f"'{part.strip()}'" if isinstance(value, bool | int | float) else part
                for part, value in zip(parts, values, strict=True)
            ]
            word = f"{key}={','.join(parts)}"
        quoted.append(word)
    return quoted


def _takes_text(key: str, schema: type) -> bool:
    """Whether a value of the key is text, or may be."""
    annotation: Any = schema
    for part in key.split("."):
        inner = strip_optional(annotation)
        fields = typing.get_type_hints(inner) if dataclasses.is_dataclass(inner) else {}
        if part not in fields:
            return False
        annotation = fields[part]
    return annotation is Any or strip_optional(annotation) is str


def missing_model(config_dir: Path) -> Fault:
    """Return the fault of a command line that chooses neither a model nor an experiment."""
    groups = group_options(config_dir)
    return Fault(
        "model",
        "???",
        f"choose a model with +model=NAME: {', '.join(groups.get('model', []))};"
        " or a checkpoint's own with +model=hf:FOLDER;"
        f" or a recipe with +experiment=NAME: {', '.join(groups.get('experiment', []))}",
    )


def _group_faults(
    override: Override, groups: dict[str, list[str]], chosen: set[str]
) -> list[Fault]:
    group, options = override.key_or_group, groups[override.key_or_group]
    if override.is_delete():
        return []
    names: Any = override.value()
    if isinstance(names, Glob):  # it finds what there is
        names = options
    elif override.is_sweep_override():
        names = list(override.sweep_iterator())
    for name in names if isinstance(names, list) else [names]:
        if str(name) not in options:
            known = f"{suggest(str(name), options)}choose one of {', '.join(options)}"
            return [Fault(group, name, f"no such {group}; {known}")]
    if group == "model" and "experiment" in chosen and override.is_add():
        return [
            Fault(
                "+model",
                names,
                f"the experiment chooses its model; write model={names} to replace it",
            )
        ]
    chosen_before = {"model", "experiment"} if "experiment" in chosen else set()
    if group in APPENDED and not override.is_add() and group not in chosen_before:
        return [Fault(group, names, f"write +{group}={names}")]
    if group not in APPENDED and override.is_add():
        return [Fault(f"+{group}", names, f"has a default already; write {group}={names}")]
    return []


def parsed_value(word: str) -> tuple[str, Any]:
    """Return key and value of a word of which :func:`check_overrides` found no fault."""
    override = OverridesParser.create().parse_override(word)
    return override.key_or_group, override.value()


def missing_key(key: str, schema: type) -> Fault:
    """Return the fault of a command line that leaves out a key which has no default."""
    annotation: Any = schema
    key, _, member = key.partition("[")  # of a list: key=[???]
    for part in key.split("."):
        annotation = typing.get_type_hints(strip_optional(annotation))[part]
    return Fault(key, "[???]" if member else "???", f"must be given: {_expected(annotation)}")


def _key_faults(override: Override, groups: dict[str, list[str]], schema: type) -> list[Fault]:
    """Whether the key exists in the schema and its type takes the value."""
    key = override.key_or_group
    annotation: Any = schema
    owner: Any = schema
    known: list[str] = []
    prefix = ""
    for part in key.split("."):
        inner = strip_optional(annotation)
        fields = typing.get_type_hints(inner) if dataclasses.is_dataclass(inner) else {}
        if part not in fields:
            if annotation is Any:  # data.path takes whatever structure it is given
                return []
            value = "" if override.is_delete() else override.get_value_string()
            return [Fault(key, value, _unknown_key(part, prefix, list(fields) or known, groups))]
        known = list(fields)
        owner, annotation = inner, fields[part]
        prefix = f"{prefix}{part}."
    if override.is_delete():
        return [Fault(f"~{key}", "", "keys cannot be removed; set it to a value, or to null")]
    if override.is_add() and not override.is_force_add():
        value = override.get_value_string()
        return [Fault(f"+{key}", value, f"the key exists; write {key}={value}")]
    return _value_faults(override, owner, annotation)


def _unknown_key(part: str, prefix: str, known: list[str], groups: dict[str, list[str]]) -> str:
    names = known if prefix else sorted({*known, *groups})
    where = f"{prefix[:-1]} has " if prefix else "there are "
    return f"no such key; {suggest(part, names)}{where}{', '.join(names)}"


def _value_faults(override: Override, owner: Any, annotation: Any) -> list[Fault]:
    """Whether the field of dataclass ``owner`` that the override names takes its value."""
    key, value = override.key_or_group, override.value()
    if isinstance(value, str) and "${" in value:
        return []  # an interpolation: resolved, and checked, with the whole
    try:
        OmegaConf.update(OmegaConf.structured(owner), key.split(".")[-1], value, merge=True)
    except (OmegaConfBaseException, OverflowError):  # a whole number beyond every float
        message = f"must be {_expected(annotation)}"
        inner = strip_optional(annotation)
        if isinstance(inner, type) and issubclass(inner, Enum):
            message = suggest(str(value), inner.__members__) + message
        return [Fault(key, override.get_value_string(), message)]
    return []


def shape_faults(config: Any, prefix: str = "") -> list[Fault]:
    """Faults of parts that an interpolation or a nested list put where another type belongs.

    OmegaConf checks the types of single values only.

    Args:
        config: a dataclass of a schema.
        prefix: of its keys.
    """
    faults = []
    for name, annotation in typing.get_type_hints(type(config)).items():
        value, inner = getattr(config, name), strip_optional(annotation)
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            if isinstance(value, inner):
                faults += shape_faults(value, f"{prefix}{name}.")
                continue
            fits = False
        elif typing.get_origin(inner) is list and value is not None:
            (item,) = typing.get_args(inner)
            fits = isinstance(value, list) and all(type(member) is item for member in value)
        elif annotation is Any:
            fits = not dataclasses.is_dataclass(value)
        else:
            continue
        if not fits:
            faults.append(Fault(f"{prefix}{name}", value, f"must be {_expected(annotation)}"))
    return faults


def strip_optional(annotation: Any) -> Any:
    """``X`` of ``X | None``, else the annotation itself."""
    if isinstance(annotation, types.UnionType):
        return next(arm for arm in typing.get_args(annotation) if arm is not types.NoneType)
    return annotation


def _expected(annotation: Any) -> str:
    """Return a type in words."""
    inner = strip_optional(annotation)
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
    }
    if isinstance(inner, type) and issubclass(inner, Enum):
        text = f"one of {', '.join(inner.__members__)}"
    elif inner in words:
        text = words[inner]
    elif typing.get_origin(inner) is list:
        (item,) = typing.get_args(inner)
        known = {int: "a list of integers", str: "a list of texts", Path: "a list of paths"}
        if isinstance(item, type) and issubclass(item, Enum):
            text = f"a list of {', '.join(item.__members__)}"
        else:
            text = known.get(item, "a list")
    elif dataclasses.is_dataclass(inner):
        text = f"keys among {', '.join(typing.get_type_hints(inner))}"
    elif annotation is Any:
        text = "text, or a list or mapping of texts"
    else:
        text = str(inner)
    return text if inner is annotation else f"{text}, or null"
