"""The ``ttt_*`` keys of a ``config.json`` <-> :class:`TTTConfig`.

``ttt_mode, ttt_layers, ttt_proj, ttt_lr, ttt_chunk, ttt_target`` are the names of the published
reference implementation, with its values where one is absent; what they cannot say goes into
``ttt_conv, ttt_decay, ttt_clip_mode, ttt_clip_bound, ttt_normalize``.
"""

import warnings
from typing import Any

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import (
    ClipConfig,
    ClipMode,
    Normalize,
    TargetSource,
    TTTConfig,
    TTTMode,
)
from megatron_ttt.conversion.mapping import TargetGenerator

REFERENCE_LEARNING_RATE = 0.3
REFERENCE_CHUNK = 8192
LAYER_INTERVAL = 6
_TARGETS = {
    TargetSource.hidden_states: "hidden_states",
    TargetSource.input_embeddings: "input_embed",
}


def ttt_from_hf(config: dict[str, Any], *, layers: int, where: str) -> TTTConfig | None:
    """The fast weights a ``config.json`` describes; ``None`` for a plain model.

    Layers that the model lacks are dropped with one warning (a published configuration names one).

    Args:
        config: content of ``config.json``.
        layers: of the model.
        where: named in errors.

    Raises:
        ConfigError: a value that means nothing.
    """
    if not config.get("ttt_mode", False):
        return None
    given = config.get("ttt_layers")
    chosen = list(range(0, layers, LAYER_INTERVAL)) if given is None else sorted(set(given))
    absent = [layer for layer in chosen if not 0 <= layer < layers]
    if absent:
        warnings.warn(
            f"{where}: ttt_layers {absent} are dropped: layers are 0 to {layers - 1}", stacklevel=2
        )
    targets = {name: source for source, name in _TARGETS.items()}
    target = config.get("ttt_target", "hidden_states")
    if target not in targets:
        raise ConfigError([Fault(f"{where}: ttt_target", target, f"one of {', '.join(targets)}")])
    try:
        normalize = Normalize(config.get("ttt_normalize", "none"))
        clip = ClipConfig(
            mode=ClipMode(config.get("ttt_clip_mode", "off")),
            bound=config.get("ttt_clip_bound", ClipConfig().bound),
        )
    except ValueError as error:
        raise ConfigError([Fault(f"{where}: ttt_normalize, ttt_clip_mode", error, "")]) from error
    return TTTConfig(
        layers=[layer for layer in chosen if 0 <= layer < layers],
        chunk_size=config.get("ttt_chunk", REFERENCE_CHUNK),
        eta=config.get("ttt_lr", REFERENCE_LEARNING_RATE),
        normalize=normalize,
        target=targets[target],
        conv=config.get("ttt_conv", True),
        proj=config.get("ttt_proj", True),
        decay=config.get("ttt_decay", 1.0),
        clip=clip,
    )


def hf_from_ttt(ttt: TTTConfig, *, layers: int) -> dict[str, Any]:
    """The ``ttt_*`` keys; none for a plain model.

    A convolution that is switched off is exported as an identity kernel, since the published keys
    cannot say that there is none.
    """
    target = target_generator(ttt, layers=layers)
    if not target.layers:
        return {}
    return {
        "ttt_mode": True,
        "ttt_layers": list(target.layers),
        "ttt_proj": ttt.proj,
        "ttt_lr": ttt.eta,
        "ttt_chunk": ttt.chunk_size,
        "ttt_target": _TARGETS[ttt.target],
        "ttt_conv": True,
        "ttt_decay": ttt.decay,
        "ttt_clip_mode": ttt.clip.mode.value,
        "ttt_clip_bound": ttt.clip.bound,
        "ttt_normalize": ttt.normalize.value,
    }


def target_generator(ttt: TTTConfig | None, *, layers: int) -> TargetGenerator:
    """Which target tensors a model of that many layers has."""
    if ttt is None or ttt.mode is TTTMode.off:
        return TargetGenerator((), conv=False, proj=False)
    chosen = range(0, layers, LAYER_INTERVAL) if ttt.layers is None else sorted(ttt.layers)
    return TargetGenerator(tuple(chosen), conv=ttt.conv, proj=ttt.proj)
