"""Whether a run directory belongs to the run that is about to start in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from megatron_ttt.config.faults import Fault, show
from megatron_ttt.config.schema import Config
from megatron_ttt.rule import in_todays_words

CONFIG_FILE = "config.yaml"

# What may differ when a run is continued: where and how it runs, not what it computes.
FREE_ON_RESUME = (
    "checkpoint",
    "data.cache_dir",
    "data.changed",
    "data.workers",
    "logging",
    "model.attention",
    "parallel",
    "run",
    "train.micro_batch_size",
    "train.recompute",
    "train.recompute_modules",
    "train.steps",
    "validation",
)


def changed_keys(saved: Mapping[Any, Any], current: Mapping[Any, Any]) -> list[str]:
    """Dotted keys, sorted, whose values differ and may not differ within one run.

    Args:
        saved: the nested plain containers of the run's ``config.yaml``.
        current: the same of the configuration that wants to continue it.
    """
    before, after = flatten(saved), flatten(current)
    return [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_free(key)
    ]


def run_directory_faults(config: Config) -> list[Fault]:
    """Return the fault of a ``run.dir`` whose ``config.yaml`` describes another run."""
    file = Path(config.run.dir) / CONFIG_FILE
    try:
        if not file.is_file():
            return []
    except OSError as error:
        message = f"cannot be looked at ({error.strerror})"
        return [Fault("run.dir", config.run.dir, message)]
    try:
        saved = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict):
        return [
            Fault(
                "run.dir",
                config.run.dir,
                f"its {CONFIG_FILE} cannot be read; choose another run.dir or run.name",
            )
        ]
    saved, current = with_defaults(saved), plain(config)
    keys = changed_keys(saved, current)
    if not keys:
        return []
    before, after = flatten(saved), flatten(current)
    differences = ", ".join(
        f"{key}={show(before.get(key))} there and {show(after.get(key))} here" for key in keys
    )
    message = f"holds another configuration ({differences}); choose another run.dir or run.name"
    return [Fault("run.dir", config.run.dir, message)]


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration as plain containers, as ``config.yaml`` and manifests hold it."""
    made = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items()}


def with_defaults(saved: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a saved configuration in today's words, with the keys that it lacks at their defaults.

    A key that was added since has a default that computes what was computed before it existed.
    """
    defaults = OmegaConf.to_container(OmegaConf.structured(Config), enum_to_str=True)
    assert isinstance(defaults, dict)
    return _over(defaults, in_todays_words(saved))


def _over(defaults: Mapping[Any, Any], saved: Mapping[Any, Any]) -> dict[str, Any]:
    """Return ``saved``, completed key by key, group by group."""
    merged = {str(key): value for key, value in {**defaults, **saved}.items()}
    for key, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = _over(value, merged[key])
    return merged


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
