"""Many configurations quickly: each choice of groups is composed once, keys are set on copies."""

import copy
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from megatron_ttt.config.load import load_config
from megatron_ttt.config.schema import Config


@cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    composed = OmegaConf.structured(load_config(groups))
    assert isinstance(composed, DictConfig)
    return composed


def configured(*words: str) -> Config:
    """What ``load_config(words)`` returns (a test holds it to that), in milliseconds.

    Interpolated values (``run.name``) are those of the groups alone.
    """
    groups = tuple(word for word in words if "." not in word.split("=")[0])
    composed = copy.deepcopy(_composed(groups))
    parser = OverridesParser.create()
    for word in words:
        if word not in groups:
            override = parser.parse_override(word)
            OmegaConf.update(composed, override.key_or_group, override.value())
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config
