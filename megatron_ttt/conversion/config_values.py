"""Values of a ``config.json`` by type: a wrong type is a fault of one line, never a traceback.

A JSON file can hold anything under any key: text where a number belongs, ``"false"``, infinity, a
number with four hundred digits. Whole numbers become floats where floats belong, and nothing else
is converted: a value is what it says, or it is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault

LARGEST = 2**40  # of an integer: beyond any size, and far from where arithmetic breaks
REFUSED: Any = object()  # instead of what absence or null stand for: they stand for nothing


class Values:
    """Typed access to one JSON object; collects what is wrong with it.

    Absence and null are told apart, since they mean different things to ``transformers``. After a
    fault some valid value stands in, so that all faults are found in one pass.

    Attributes:
        content: the object.
        where: named in faults.
        faults: found so far.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where
        self.faults: list[Fault] = []

    def check(self) -> None:
        """End the reading of a configuration.

        Raises:
            ConfigError: there are faults.
        """
        if self.faults:
            raise ConfigError(self.faults)

    def fault(self, key: str, message: str) -> None:
        """Note what is wrong with a key's value."""
        self.faults.append(Fault(f"{self.where}: {key}", shown(self.content.get(key)), message))

    def integer(
        self, key: str, default: Any = REFUSED, *, null: Any = REFUSED, most: int = LARGEST
    ) -> Any:
        """Return a whole number from 1 to ``most``, or what absence or null stand for."""
        value, given = self._given(key, default, null)
        if not given:
            return 1 if value is REFUSED else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            self.fault(key, f"must be a whole number from 1 to {most}")
            return 1
        return value

    def number(
        self, key: str, default: Any = REFUSED, *, null: Any = REFUSED, zero: bool = False
    ) -> float:
        """Return a finite number above 0 (``zero``: or 0), or what absence or null stand for."""
        value, given = self._given(key, default, null)
        if not given:
            return 1.0 if value is REFUSED else value
        real = as_real(value)
        if real is None or real < 0 or (real == 0 and not zero):
            self.fault(key, f"must be a finite number {'of at least' if zero else 'above'} 0")
            return 1.0
        return real

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false, nothing that merely counts as one."""
        value = self.content.get(key, default)
        if not isinstance(value, bool):
            self.fault(key, "must be true or false")
            return default
        return value

    def text(self, key: str, default: str, choices: tuple[str, ...] | None = None) -> str:
        """Return a string, one of ``choices`` where there are any."""
        value = self.content.get(key, default)
        if not isinstance(value, str) or (choices is not None and value not in choices):
            known = "must be a text" if choices is None else f"one of {', '.join(choices)}"
            self.fault(key, known)
            return default
        return value

    def objects(self, key: str) -> dict[str, Any]:
        """Return an object; absent, null and empty are the same."""
        value = self.content.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.fault(key, "must be an object or null")
            return {}
        return value

    def entries(self, key: str, kind: type) -> list[Any] | None:
        """Return a list of values of one type; ``None`` where it is absent or null."""
        value = self.content.get(key)
        if value is None:
            return None
        right = isinstance(value, list) and all(type(entry) is kind for entry in value)
        if not right:
            self.fault(key, f"must be a list of {kind.__name__} values, or null")
            return None
        return list(value)

    def _given(self, key: str, default: Any, null: Any) -> tuple[Any, bool]:
        """Return the value and whether it was written; ``REFUSED`` after a fault."""
        if key not in self.content:
            if default is REFUSED:
                self.fault(key, "is missing")
            return default, False
        value = self.content[key]
        if value is None and null is not REFUSED:
            return null, False
        return value, True


def as_real(value: Any) -> float | None:
    """Return a finite float, or ``None`` for everything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        real = float(value)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def shown(value: Any) -> str:
    """Return a JSON value for a message, shortened."""
    try:
        text = "null" if value is None else str(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number too long to print"
    return text if len(text) <= 80 else text[:77] + "..."
