"""Whether a run may start from a checkpoint: its model and its update rule beside the checkpoint's.

A difference that a default or a recipe makes is a mistake. One that the user gave is a choice, and
is named in one line.
"""

from collections.abc import Collection
from typing import Any

from megatron_ttt.config.bounds import flat_values
from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.schema import TTTConfig, TTTMode
from megatron_ttt.conversion.ttt_config import target_generator
from megatron_ttt.rule import ClipMode, WriteKind


def rule_notices(
    rule: TTTConfig, trained: TTTConfig, *, layers: int, given: Collection[str], where: str
) -> list[str]:
    """Compare the update rule of a run with that under which a checkpoint was trained.

    The same checkpoint without fast weights is a baseline, and a plain one has no rule: where
    either is ``off`` nothing is compared.

    Args:
        rule: the run's.
        trained: the checkpoint's.
        layers: of the model.
        given: dotted keys that the user gave.
        where: the checkpoint, for the message.

    Returns:
        One line for each differing key that the user gave.

    Raises:
        ConfigError: one fault for each differing key that the user did not give.
    """
    if TTTMode.off in (rule.mode, trained.mode):
        return []
    ours, theirs = _flat(rule, layers), _flat(trained, layers)
    notices, faults = [], []
    for key, value in ours.items():
        other = theirs[key]
        if value == other:
            continue
        if any(key == one or key.startswith(f"{one}.") for one in given):
            trained_with = f"the checkpoint was trained with {show(other)} ({where})"
            notices.append(f"notice: {key}={show(value)}, {trained_with}")
            continue
        message = (
            f"the checkpoint was trained with {show(other)} ({where}); give {key}={show(other)},"
            f" or {key}={show(value)} to change the update rule"
        )
        faults.append(Fault(key, value, message))
    if faults:
        raise ConfigError(faults)
    return notices


def _flat(rule: TTTConfig, layers: int) -> dict[str, Any]:
    """Keys and values; what is not named is resolved, and a bound of a clip that is off is none."""
    flat = dict(flat_values(rule, "ttt."))
    flat["ttt.layers"] = list(target_generator(rule, layers=layers).layers)
    if rule.clip.mode is ClipMode.off:
        flat["ttt.clip.bound"] = None
    if rule.write.kind is not WriteKind.bounded:
        flat["ttt.write.bound"] = None
    return flat
