"""``+model=hf:FOLDER``, or a checkpoint's or run's folder: a model that says itself what it is.

The word becomes the keys that the checkpoint says, before Hydra sees the command line: its model,
the update rule that it was trained with, its tokenizer, and that training starts from its weights.
Words that the user gives beside it come after them and hold; those of the checkpoint do not count
as given, since nobody chose them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ttt.config.bounds import flat_values
from megatron_ttt.config.faults import ConfigError, Fault, show
from megatron_ttt.config.overrides import names_checkpoint
from megatron_ttt.config.schema import HF_SCHEME, TTTMode
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.manifest import has_trained_rule
from megatron_ttt.conversion.opened import Checkpoint, open_checkpoint
from megatron_ttt.conversion.ttt_config import has_rule


def spelled_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what a checkpoint that is named as the model says, and the words beside its name.

    Args:
        words: as typed; those that name a file of ``configs/model`` stay as they are.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged.
    """
    said: list[str] = []
    rest: list[str] = []
    for word in words:
        key, _, named = word.partition("=")
        if not names_checkpoint(word):
            rest.append(word)
            continue
        try:
            said += _words_of(open_checkpoint(named), words)
        except ConfigError as error:
            faults = [
                Fault(key, named, fault.message) if fault.key == "checkpoint" else fault
                for fault in error.faults
            ]
            raise ConfigError(faults) from error
    return said, rest


def _words_of(checkpoint: Checkpoint, given: Sequence[str]) -> Iterator[str]:
    own = dict(flat_values(checkpoint.model, "model."))
    del own["model.attention"]  # how it was computed, not what it is
    if "ttt=off" not in given and _is_trained(checkpoint):
        own |= dict(flat_values(checkpoint.ttt, "ttt."))
    yield from (f"{key}={_shown(value)}" for key, value in own.items())
    if not _gives(given, "checkpoint.load="):
        scheme = "" if checkpoint.is_megatron else HF_SCHEME
        yield f"checkpoint.load={_quoted(f'{scheme}{checkpoint.path}')}"
    tokenizer = checkpoint.tokenizer().name
    if tokenizer is None or _gives(given, "data.tokenizer.", "data="):
        return
    if tokenizer == "bytes":
        yield "data.tokenizer.kind=bytes"
    else:
        yield f"data.tokenizer.name={_quoted(tokenizer)}"


def _is_trained(checkpoint: Checkpoint) -> bool:
    """Whether it has fast weights that were trained under the rule it names."""
    if checkpoint.ttt.mode is TTTMode.off:
        return False
    if isinstance(checkpoint.opened, HFFolder):
        return has_rule(checkpoint.opened.config)
    return has_trained_rule(checkpoint.opened.facts, checkpoint.path)


def _gives(given: Sequence[str], *beginnings: str) -> bool:
    return any(word.startswith(beginnings) for word in given)


def _shown(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else show(value)


def _quoted(text: str) -> str:
    """Return a text as Hydra's grammar reads it, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
