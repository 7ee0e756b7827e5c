"""What a Megatron checkpoint's manifest says about its model."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import ModelConfig, TTTConfig
from megatron_ttt.conversion.hf_config import check_agreement
from megatron_ttt.conversion.importing import IMPORTED_FROM, ORIGIN
from megatron_ttt.conversion.megatron_folder import MANIFEST, MegatronFolder

HF_SCHEME = "hf:"  # of checkpoint.load
_DEPTH = 8  # runs that started from runs that started from an import


def described_model(folder: MegatronFolder) -> tuple[ModelConfig, TTTConfig]:
    """The configuration under which a checkpoint was imported or trained.

    Raises:
        ConfigError: there is no manifest, or it does not describe a model.
    """
    config = folder.facts.get("config", {})
    if "model" not in config or "ttt" not in config:
        message = f"{MANIFEST} does not describe the model"
        raise ConfigError([Fault("checkpoint", folder.path, message)])
    path = folder.path
    return _typed(ModelConfig, config["model"], path), _typed(TTTConfig, config["ttt"], path)


def check_imported(facts: dict[str, Any], model: ModelConfig, path: Path) -> None:
    """A run that starts from an imported checkpoint must describe the same model.

    Args:
        facts: of the checkpoint's manifest; those of a training run are left to the loader.
        model: the run's.
        path: of the checkpoint.

    Raises:
        ConfigError: one fault for each differing key.
    """
    if IMPORTED_FROM in facts:
        check_agreement(model, _typed(ModelConfig, facts["config"]["model"], path), str(path))


def origin(folder: MegatronFolder) -> Path | None:
    """The folder with the tokenizer that belongs to a checkpoint, where it can be told.

    An imported checkpoint carries it; a trained one names what it started from.
    """
    facts, path = folder.facts, folder.path
    for _ in range(_DEPTH):
        if (path / ORIGIN).is_dir():
            return path / ORIGIN
        load = facts.get("config", {}).get("checkpoint", {}).get("load")
        if load is None:
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
    except OmegaConfBaseException as error:
        text = str(error).strip().splitlines()[0]
        message = f"{MANIFEST} describes no model of this version: {text}"
        raise ConfigError([Fault("checkpoint", path, message)]) from error
