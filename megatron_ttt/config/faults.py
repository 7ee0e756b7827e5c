"""What is wrong with a configuration: one :class:`Fault` a mistake, one line a fault."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One mistake: the configuration key, the value it has, and what would be valid."""

    key: str
    value: Any
    message: str

    def line(self) -> str:
        """Return the fault as the one line that a user reads; long texts are cut short."""
        value, message = _cut(show(self.value), 120), _cut(self.message, 1000)
        return " ".join(f"{_cut(self.key, 120)}={value}: {message}".split())


class ConfigError(ValueError):
    """A user's mistake, found while the configuration is read or when a run starts.

    The programs print one line per fault and exit with status 2. Whatever discovers such a
    mistake later (a corrupt data file, a vocabulary that is too small) raises it as well.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults, "a configuration error without a fault"
        self.faults = tuple(faults)
        super().__init__("\n".join(fault.line() for fault in self.faults))


def show(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def suggest(word: str, choices: Iterable[str]) -> str:
    """``did you mean X?`` with its trailing space where a choice is near, else nothing."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""
