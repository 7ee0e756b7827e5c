"""What differs between a run that starts and the checkpoint that it goes on from."""

from collections.abc import Callable
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.run_directory import changed_keys, flatten, plain, with_defaults
from megatron_ttt.config.schema import ChangedData, Config
from megatron_ttt.data.fingerprint import differences
from megatron_ttt.training.checkpoint import Found

# With the texts, these decide which sample bears which number.
_ORDER = ("train.seed", "train.seq_length", "data.split")
# What says where the texts are; that they are the same is the fingerprint's to say.
_PLACES = ("data.path", "data.source", "data.tokenizer")

_GROUPS = "optimizer.target_lr_factor"
_FREE_BUT_TOLD = ("train.steps",)  # the schedule ends where they do


def check_changes(
    found: Found, config: Config, data: dict[str, Any], report: Callable[[str], None]
) -> None:
    """Refuse to go on over other data unless that is asked for; report every other change.

    Args:
        found: the checkpoint.
        config: of the run that starts.
        data: fingerprint of its data.
        report: told one line about each kind of change, and about what cannot be compared.

    Raises:
        ConfigError: ``train.steps`` are done already, the data changed, or the optimizer's groups
            of parameters are others.
    """
    done = found.progress.step
    if config.train.steps < done:
        message = f"{found.folder} has {done} steps already; give at least as many"
        raise ConfigError([Fault("train.steps", config.train.steps, message)])
    saved, saved_data = found.facts.get("config"), found.facts.get("data")
    if not isinstance(saved, dict):
        report(f"{found.folder} has no record of its configuration: changes cannot be told")
        saved = plain(config)
    before, now = flatten(with_defaults(saved)), flatten(plain(config))
    if before.get(_GROUPS) != now.get(_GROUPS):
        message = (
            f"the optimizer of {found.folder} was saved with {show(before.get(_GROUPS))}, by which"
            " its parameters are grouped; give that, or start anew (checkpoint.load)"
        )
        raise ConfigError([Fault(_GROUPS, now.get(_GROUPS), message)])
    changed = [
        f"{key} {show(before.get(key))} then, {show(now.get(key))} now"
        for key in _ORDER
        if before.get(key) != now.get(key)
    ]
    places: tuple[str, ...] = ()
    if isinstance(saved_data, dict):
        places = _PLACES
        changed += differences(saved_data, data)
    else:
        report(f"{found.folder} has no record of its texts: whether these are the same is unknown")
    if changed:
        _refuse_or_tell(found, config, "; ".join(changed), report)
    free = [key for key in _FREE_BUT_TOLD if before.get(key) != now.get(key)]
    others = [
        f"{key} {show(before.get(key))} then, {show(now.get(key))} now"
        for key in sorted(changed_keys(with_defaults(saved), plain(config)) + free)
        if key not in _ORDER and not key.startswith(places)
    ]
    if others:
        report(f"changed since {found.folder}: {', '.join(others)}")


def _refuse_or_tell(
    found: Found, config: Config, changed: str, report: Callable[[str], None]
) -> None:
    place = found.progress.consumed_samples
    if config.data.changed is ChangedData.refuse:
        message = (
            f"this is not the data of {found.folder} ({changed}); bring that back, or say"
            f" data.changed=accept: training then goes on at sample {place} of the new order, so"
            " that texts may come twice or never"
        )
        raise ConfigError([Fault("data.changed", config.data.changed, message)])
    report(
        f"data.changed=accept: this is not the data of {found.folder} ({changed}); going on at"
        f" sample {place} of the new order: texts may come twice or never"
    )
