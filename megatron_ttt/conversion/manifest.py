"""What a Megatron checkpoint's manifest says about its model."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ttt.checkpoints.json_files import read_json
from megatron_ttt.checkpoints.manifest import MANIFEST
from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import HF_SCHEME, Config, ModelConfig, TTTConfig
from megatron_ttt.conversion.agreement import rule_notices
from megatron_ttt.conversion.hf_config import CHOICES, check_agreement
from megatron_ttt.conversion.importing import IMPORTED_FROM, ORIGIN
from megatron_ttt.conversion.ttt_config import has_rule

_DEPTH = 8  # runs that started from runs that started from an import


def described_model(folder: MegatronFolder) -> tuple[ModelConfig, TTTConfig]:
    """Return the configuration under which a checkpoint was imported or trained.

    Raises:
        ConfigError: there is no manifest, or it does not describe a model.
    """
    config = folder.facts.get("config")
    parts = ("model", "ttt")
    if not isinstance(config, dict) or not all(isinstance(config.get(p), dict) for p in parts):
        message = f"{MANIFEST} does not describe the model"
        raise ConfigError([Fault("checkpoint", folder.path, message)])
    path = folder.path
    return _typed(ModelConfig, config["model"], path), _typed(TTTConfig, config["ttt"], path)


def check_start(
    facts: dict[str, Any], config: Config, path: Path, *, given: Collection[str]
) -> list[str]:
    """Return a run that starts from a checkpoint must describe the same model and update rule.

    A plain model's import has target generators that were never trained: any rule is its first.

    Args:
        facts: of the checkpoint's manifest.
        config: the run.
        path: of the checkpoint.
        given: dotted keys that the user gave.

    Returns:
        One line for each difference that the user chose.

    Raises:
        ConfigError: one fault for each other differing key.
    """
    described, where = facts.get("config", {}), str(path)
    notices = []
    if "model" in described:
        checkpoint = _typed(ModelConfig, described["model"], path)
        # how a model of one's own goes on is one's own affair
        chosen = set(given) & set(CHOICES) if IMPORTED_FROM in facts else given
        notices += check_agreement(config.model, checkpoint, where, chosen=chosen)
    if "ttt" in described and has_trained_rule(facts, path):
        trained, layers = _typed(TTTConfig, described["ttt"], path), config.model.layers
        notices += rule_notices(config.ttt, trained, layers=layers, given=given, where=where)
    return notices


def has_trained_rule(facts: dict[str, Any], path: Path) -> bool:
    """Whether the checkpoint's rule is one that it was trained with, not one it was given."""
    if IMPORTED_FROM not in facts:
        return True
    source = path / ORIGIN / "config.json"
    if not source.is_file():
        return False
    config = read_json(source)
    return has_rule(config) and config.get("ttt_mode", True) is not False


def origin(folder: MegatronFolder) -> Path | None:
    """Return the folder with the tokenizer that belongs to a checkpoint, where it can be told.

    An imported checkpoint carries it; a trained one names what it started from.
    """
    facts, path = folder.facts, folder.path
    for _ in range(_DEPTH):
        if (path / ORIGIN).is_dir():
            return path / ORIGIN
        config = facts.get("config")
        started = config.get("checkpoint") if isinstance(config, dict) else None
        load = started.get("load") if isinstance(started, dict) else None
        if not isinstance(load, str):
            return None
        if load.startswith(HF_SCHEME):
            start = Path(load.removeprefix(HF_SCHEME))
            return start if start.is_dir() else None
        path = Path(load)
        if not path.exists():
            return None
        before = MegatronFolder(path)
        path, facts = before.path, before.facts
    return None


def _typed(kind: type, values: dict[str, Any], path: Path) -> Any:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        text = str(error).strip().splitlines()[0]
        message = f"{MANIFEST} describes no model of this version: {text}"
        raise ConfigError([Fault("checkpoint", path, message)]) from error
