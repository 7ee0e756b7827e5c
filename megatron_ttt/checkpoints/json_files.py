"""Small files of checkpoints, whose faults are one line for the user."""

import json
from pathlib import Path
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault


def read_json(path: Path) -> dict[str, Any]:
    """Return an object from a JSON file.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{path.name} is missing"
        raise ConfigError([Fault("checkpoint", path.parent, message)]) from None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    except RecursionError:
        raise ConfigError([Fault("checkpoint", path, "is nested too deeply")]) from None
    if not isinstance(content, dict):
        raise ConfigError([Fault("checkpoint", path, "holds no JSON object")])
    return content


def damaged(path: Path, error: Exception) -> ConfigError:
    """Return an unreadable file as a user's error of one line."""
    return ConfigError([Fault("checkpoint", path, f"is damaged or unreadable ({error})")])
