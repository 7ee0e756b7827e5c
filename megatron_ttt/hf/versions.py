"""Which ``transformers`` the classes run under; nothing else is imported here."""

from __future__ import annotations

import re

OLDEST = (5, 20)  # the cache and mask interfaces that the classes build on


def check_transformers(version: str) -> None:
    """Refuse an older ``transformers`` by its version, before a missing name of it does.

    Raises:
        ImportError: it is older than ``OLDEST``.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(
            f"models with fast weights need transformers>={needed}, and this is {version}: "
            f"pip install 'transformers>={needed}'"
        )
