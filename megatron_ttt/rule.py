"""The update rule of fast weights: its settings, their meaning and validity. No torch, no Hydra.

    apply    O_i = Z_i (W0 + eta * S_i)^T
    update   S_{i+1} = k_i * S_i + L_i^T R_i              L, R, k: what the write rule makes of V, Z

The one owner of these facts: Hydra's group ``ttt``, the layers, the ``transformers`` classes, the
state of inference, sessions and memories all hold an :class:`UpdateRule`. The mathematics of the
write rules is in ``fast_weights/write_rules.py``; what they need and which parameters they have is
declared here, so that models, checkpoints and conversion follow from one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

LAYER_INTERVAL = 6  # by default every sixth layer has fast weights
KERNEL_SIZE = 5  # tokens that the published target's convolution reads
LARGEST_KERNEL = 9  # a ParameterSpec spells a size with one digit
POWER_ITERATIONS = 4  # behind a spectral norm


class TargetSource(Enum):
    """Where the target generator reads: the MLP's normalised input, or the input embeddings."""

    hidden_states = "hidden_states"
    input_embeddings = "input_embeddings"


class Conv(Enum):
    """Which neighbours of a token its target is made of, by a depthwise convolution.

    ``learned``: those around it, as published. ``causal``: itself and those before it.
    ``next_token``: the one behind it, whole and with nothing to learn (TTT-NTP, arXiv 2606.21803).
    ``off``: itself, the reconstruction target.
    """

    learned = "learned"
    next_token = "next_token"
    causal = "causal"
    off = "off"

    @property
    def is_learned(self) -> bool:
        """Whether it has a parameter."""
        return self in (Conv.learned, Conv.causal)


def conv_of(value: Any) -> Any:
    """Return what a file says of the convolution in today's words: it used to say true or false."""
    if isinstance(value, bool):
        return (Conv.learned if value else Conv.off).value
    return value


def in_todays_words(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a saved configuration, of a run or a checkpoint, with its rule as it is said today."""
    rule = config.get("ttt")
    if not isinstance(rule, Mapping) or "conv" not in rule:
        return dict(config)
    return {**config, "ttt": {**rule, "conv": conv_of(rule["conv"])}}


def conv_offsets(conv: Conv, kernel_size: int) -> range:
    """Return where the tokens lie that a target is made of; 0 is the target's own."""
    if conv is Conv.learned:
        return range(-(kernel_size // 2), kernel_size // 2 + 1)
    if conv is Conv.causal:
        return range(1 - kernel_size, 1)
    return range(1, 2) if conv is Conv.next_token else range(1)


def kernel_complaint(conv: str, kernel_size: int) -> str | None:
    """Return what is wrong with the size of a kernel, if anything; ``conv``: a word of Conv."""
    if not 1 <= kernel_size <= LARGEST_KERNEL:
        return f"must be 1 to {LARGEST_KERNEL}"
    if conv == Conv.learned.value and kernel_size % 2 == 0:
        return "must be odd: the kernel is centred (ttt.conv=causal takes any)"
    return None


class Normalize(Enum):
    """What a chunk's write is divided by.

    ``none``: nothing, as published. ``key_energy``: the keys' mean square, which makes eta
    dimensionless. ``spectral``: its spectral norm, so that each chunk writes a matrix of norm eta.
    """

    none = "none"
    key_energy = "key_energy"
    spectral = "spectral"


class ClipMode(Enum):
    """What the bound of a chunk's write is measured in."""

    off = "off"
    relative = "relative"  # times norm(W0)
    absolute = "absolute"


class WriteKind(Enum):
    """What a chunk writes; the equations are in ``fast_weights/write_rules.py``."""

    plain = "plain"
    gated = "gated"  # a learned gate per token multiplies what it writes
    bounded = "bounded"  # the state never outgrows a share of W0


@dataclass
class Clip:
    """Bound of ``eta * norm(M)``, M a chunk's summary: ``bound * norm(W0)`` or ``bound``."""

    mode: ClipMode = ClipMode.off
    bound: float = 0.1


@dataclass
class WriteSettings:
    """Keys ``ttt.write.*``."""

    kind: WriteKind = WriteKind.plain
    bound: float = 0.3  # of kind=bounded: norm(eta * S) <= bound * norm(W0)


@dataclass
class UpdateRule:
    """How a layer reads and writes its fast weight; keys ``ttt.*``."""

    chunk_size: int = 1024
    eta: float = 0.3
    normalize: Normalize = Normalize.none
    target: TargetSource = TargetSource.hidden_states
    conv: Conv = Conv.learned
    kernel_size: int = KERNEL_SIZE  # tokens that a convolution with parameters reads
    proj: bool = True
    decay: float = 1.0  # gamma, per chunk; 1 keeps everything
    clip: Clip = field(default_factory=Clip)
    write: WriteSettings = field(default_factory=WriteSettings)


class Start(Enum):
    """Initial value of a parameter; the target generator starts so that a model is unchanged."""

    zeros = "zeros"
    diagonal = "diagonal"  # N(0, initializer_range^2) on the diagonal, 0 elsewhere


class Placement(Enum):
    """How a parameter lies on the ranks of a tensor-parallel group."""

    whole = "whole"  # on every rank; each has a part of its gradient
    columns = "columns"  # the last dim is split; the gradient is complete


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter that fast weights add to a layer.

    ``shape``: letters, H for the hidden size; a digit stands for itself.
    """

    shape: str
    start: Start
    placement: Placement

    def sizes(self, hidden: int) -> tuple[int, ...]:
        """Return the whole parameter's shape."""
        return tuple(hidden if letter == "H" else int(letter) for letter in self.shape)


# The target generator, V = conv(U) @ W_target.
CONV, PROJ = "ttt_conv.weight", "ttt_proj.weight"
TARGET_PARAMETERS = {
    CONV: ParameterSpec(f"H1{KERNEL_SIZE}", Start.zeros, Placement.whole),
    PROJ: ParameterSpec("HH", Start.diagonal, Placement.columns),
}


# The gate of WriteKind.gated, 2 * sigmoid(w . x + b): exactly 1 at the start.
GATE, GATE_BIAS = "ttt_gate.weight", "ttt_gate_bias.weight"


@dataclass(frozen=True)
class WriteTraits:
    """What a write rule asks of a layer.

    Attributes:
        parameters: by name, beside the target generator's.
        needs_hidden: whether it reads the layer's normalised input, token by token.
    """

    parameters: dict[str, ParameterSpec] = field(default_factory=dict)
    needs_hidden: bool = False


WRITE_TRAITS: dict[WriteKind, WriteTraits] = {
    WriteKind.plain: WriteTraits(),
    WriteKind.gated: WriteTraits(
        parameters={
            GATE: ParameterSpec("H", Start.zeros, Placement.whole),
            GATE_BIAS: ParameterSpec("1", Start.zeros, Placement.whole),
        },
        needs_hidden=True,
    ),
    WriteKind.bounded: WriteTraits(),
}


def added_parameters(rule: UpdateRule) -> dict[str, ParameterSpec]:
    """Return the parameters that the rule adds to a layer, by their names inside the MLP."""
    target = {}
    if rule.conv.is_learned:
        shape = f"H1{rule.kernel_size}"
        target[CONV] = replace(TARGET_PARAMETERS[CONV], shape=shape)
    if rule.proj:
        target[PROJ] = TARGET_PARAMETERS[PROJ]
    return target | write_parameters(rule)


def write_parameters(rule: UpdateRule) -> dict[str, ParameterSpec]:
    """Return the parameters of the write rule, without the target generator's."""
    return WRITE_TRAITS[rule.write.kind].parameters


# What a config.json calls the target sources: the published reference implementation's words.
HF_TARGETS = {
    TargetSource.hidden_states: "hidden_states",
    TargetSource.input_embeddings: "input_embed",
}


def rule_from_keys(key: Callable[[str], Any]) -> UpdateRule:
    """Return the update rule that the ``ttt_*`` keys of a ``config.json`` say.

    Args:
        key: gives the (valid) value of one, for example of ``"ttt_lr"``.
    """
    sources = {word: source for source, word in HF_TARGETS.items()}
    return UpdateRule(
        chunk_size=key("ttt_chunk"),
        eta=key("ttt_lr"),
        normalize=Normalize(key("ttt_normalize")),
        target=sources[key("ttt_target")],
        conv=Conv(conv_of(key("ttt_conv"))),
        kernel_size=key("ttt_kernel_size"),
        proj=key("ttt_proj"),
        decay=key("ttt_decay"),
        clip=Clip(ClipMode(key("ttt_clip_mode")), key("ttt_clip_bound")),
        write=WriteSettings(WriteKind(key("ttt_write")), key("ttt_write_bound")),
    )


def keys_of_rule(rule: UpdateRule) -> dict[str, Any]:
    """Return the ``ttt_*`` keys of an update rule; the inverse of :func:`rule_from_keys`."""
    return {
        "ttt_chunk": rule.chunk_size,
        "ttt_lr": rule.eta,
        "ttt_normalize": rule.normalize.value,
        "ttt_target": HF_TARGETS[rule.target],
        "ttt_conv": rule.conv.value,
        "ttt_kernel_size": rule.kernel_size,
        "ttt_proj": rule.proj,
        "ttt_decay": rule.decay,
        "ttt_clip_mode": rule.clip.mode.value,
        "ttt_clip_bound": rule.clip.bound,
        "ttt_write": rule.write.kind.value,
        "ttt_write_bound": rule.write.bound,
    }


def added_start(name: str) -> Start | None:
    """How a parameter of a model starts, if an update rule may add it; ``None`` for all others.

    Args:
        name: of the model's parameter, for example ``decoder.layers.3.mlp.ttt_conv.weight``.
    """
    known = dict(TARGET_PARAMETERS)
    for traits in WRITE_TRAITS.values():
        known |= traits.parameters
    spec = known.get(".".join(name.split(".")[-2:]))
    return None if spec is None else spec.start


def default_layers(layers: int) -> list[int]:
    """Return the layers with fast weights, from 0, where none are named."""
    return list(range(0, layers, LAYER_INTERVAL))


def reads_hidden_apart(rule: UpdateRule) -> bool:
    """Whether writing takes hidden states beside the target source (which may be them)."""
    needs = WRITE_TRAITS[rule.write.kind].needs_hidden
    return needs and rule.target is not TargetSource.hidden_states


def _write_identity(write: WriteSettings) -> str:
    bounded = write.kind is WriteKind.bounded
    return f"{write.kind.value} {write.bound!r}" if bounded else write.kind.value


AS_PUBLISHED = "as published"  # a centred convolution, or none


def rule_identity(rule: UpdateRule) -> dict[str, Any]:
    """Return what a state written under the rule depends on, as plain values."""
    clip = rule.clip
    off = clip.mode is ClipMode.off
    return {
        "target": rule.target.value,
        "chunk_size": rule.chunk_size,
        "eta": rule.eta,
        "decay": rule.decay,
        "clip": "off" if off else f"{clip.mode.value} {clip.bound!r}",
        "normalize": rule.normalize.value,
        "conv": rule.conv.value if rule.conv in (Conv.next_token, Conv.causal) else AS_PUBLISHED,
        "write": _write_identity(rule.write),
    }
