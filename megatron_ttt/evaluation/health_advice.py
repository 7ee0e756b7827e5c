"""What a health report holds, which figures are out of their range, and what helps.

:data:`CONCERNS` is the one table of ranges, reasons and advice; the advice depends on the update
rule in use. Some bounds hold only for weights that were not trained with fast weights (continued
pretraining, its first steps): a model trained from scratch tolerates updates larger than W0. So
they are checked only where fast weights do *not* lower the loss of the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from megatron_ttt.rule import ClipMode, Conv, Normalize, UpdateRule, WriteKind

NOISE = 0.002  # nats a token: differences of two losses over few rows that mean nothing
# A fast layer's parameters, as tables and files call them and as the model does.
PARTS = {
    "conv": "mlp.ttt_conv.weight",
    "proj": "mlp.ttt_proj.weight",
    "W0": "mlp.linear_fc2.weight",
}
BEARABLE = (0.05, 0.3)  # update ratios that a pretrained backbone tolerates
_GROWTH_PLACES = 4  # places along the row from which growth can be told


@dataclass(frozen=True)
class LayerHealth:
    """One fast layer (from 0); sequences run along the places of :class:`Health`.

    The four figures are those of ``health_probe.py``, means over rows, not a number where no row
    has one. ``largest_rank`` is ``min(hidden, ffn)``. ``gradient_shares`` are the shares of conv,
    proj and W0 in the squared norm of the whole model's gradient; parts it lacks are missing.
    """

    layer: int
    update_ratio: Sequence[float]
    output_ratio: Sequence[float]
    effective_rank: Sequence[float]
    mean_key_share: Sequence[float]
    largest_rank: int
    gradient_shares: Mapping[str, float]


@dataclass(frozen=True)
class Health:
    """What was found on ``rows`` rows of ``length`` tokens.

    ``positions``: tokens before each place. Losses in nats per counted token, of the same weights
    with fast weights on and off. ``gradient_norm`` is that of the former's loss.
    """

    length: int
    rows: int
    positions: Sequence[int]
    loss_on: float
    loss_off: float
    gradient_norm: float
    layers: Sequence[LayerHealth]

    @property
    def gains(self) -> bool:
        """Whether fast weights predict these rows better than none."""
        return self.loss_off - self.loss_on > NOISE


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, of which one is given; NaN lies in none."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def outside(self) -> str:
        return f"below {self.low:g}" if self.high == math.inf else f"above {self.high:g}"


class Evidence(Enum):
    """When a range is checked."""

    ALWAYS = "always"
    WITHOUT_GAIN = "without gain"


@dataclass(frozen=True)
class Concern:
    """One range of a figure.

    Attributes:
        figure: its name in the warning.
        of: the figure by place; ``""`` for the whole model. Places without one are missing.
        within: where the figure should lie.
        reason: why there.
        advice: what to try under an update rule, in the order of trying.
        evidence: ``WITHOUT_GAIN``: skip it when fast weights lower the loss.
    """

    figure: str
    of: Callable[[Health], Mapping[str, float]]
    within: Range
    reason: str
    advice: Callable[[UpdateRule], str]
    evidence: Evidence = Evidence.ALWAYS

    def warning(self, health: Health, rule: UpdateRule) -> str | None:
        """Return one line that names figure, places and advice; ``None`` if all are in range."""
        if self.evidence is Evidence.WITHOUT_GAIN and health.gains:
            return None
        outside = {p: value for p, value in self.of(health).items() if not self.within.holds(value)}
        if not outside:
            return None
        found = ", ".join(f"{place} {value:.3g}".strip() for place, value in outside.items())
        said = f"{self.figure} {self.within.outside}: {found} ({self.reason})"
        advice = self.advice(rule)
        return f"{said}. {advice[0].upper()}{advice[1:]}"


def warnings_of(health: Health, rule: UpdateRule) -> list[str]:
    """Return the warnings of all concerns in the table's order; ``rule`` is the one in use."""
    lines = (concern.warning(health, rule) for concern in CONCERNS)
    return [line for line in lines if line is not None]


def _by_layer(
    figure: Callable[[LayerHealth], float | None],
) -> Callable[[Health], dict[str, float]]:
    """Return the figure of every layer that has it."""

    def by_layer(health: Health) -> dict[str, float]:
        found = ((layer.layer, figure(layer)) for layer in health.layers)
        return {f"layer {layer}": value for layer, value in found if value is not None}

    return by_layer


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _largest_output(layer: LayerHealth) -> float | None:
    """Return that of a layer that writes; what writes nothing is another concern."""
    outputs = _known(layer.output_ratio)
    return max(outputs) if outputs and max(layer.update_ratio) > 0 else None


def _growth(health: Health) -> dict[str, float]:
    """Return update ratio at the last place over that at half its tokens, where it is large."""
    if len(health.positions) < _GROWTH_PLACES:
        return {}
    half = health.positions[-1] / 2
    middle = min(range(len(health.positions)), key=lambda p: abs(health.positions[p] - half))
    # Places are seldom at exactly half: growth is measured per doubling of the tokens read.
    doublings = math.log2(health.positions[-1] / health.positions[middle])

    def growth(layer: LayerHealth) -> float | None:
        last, before = layer.update_ratio[-1], layer.update_ratio[middle]
        if not last > BEARABLE[1] or not 0 < before < math.inf:
            return None
        return float((last / before) ** (1 / doublings))

    return _by_layer(growth)(health)


def _mean_key_share(layer: LayerHealth) -> float | None:
    shares = _known(layer.mean_key_share)
    return sum(shares) / len(shares) if shares else None


def _last_rank(layer: LayerHealth) -> float | None:
    return next(reversed(_known(layer.effective_rank)), None)


def _target_share(layer: LayerHealth) -> float | None:
    """Return that of conv and projection together, where the layer has one."""
    parts = [layer.gradient_shares[p] for p in ("conv", "proj") if p in layer.gradient_shares]
    return sum(parts) if parts else None


# Advice is given in values that differ from those in use, and names the latter.
_DECAY, _BOUND = 0.9, 0.1  # tried first


def _lower_eta(rule: UpdateRule) -> str:
    return f"lower ttt.eta (it is {rule.eta:g})"


def _bound_chunk(rule: UpdateRule) -> str:
    clip = rule.clip
    if clip.mode is ClipMode.off:
        return f"bound a chunk with ttt.clip.mode=relative ttt.clip.bound={_BOUND:g}"
    wide = clip.mode is ClipMode.relative and clip.bound > _BOUND
    tighter = _BOUND if wide else clip.bound / 2
    return f"bound a chunk tighter with ttt.clip.bound={tighter:.2g} (it is {clip.bound:g})"


def _forget(rule: UpdateRule) -> str:
    if rule.decay == 1:
        return f"forget with ttt.decay={_DECAY:g}"
    faster = min(_DECAY, rule.decay**2)  # the square forgets in one chunk what took two
    return f"forget faster with ttt.decay={faster:.2g} (it is {rule.decay:g})"


def _write_more(rule: UpdateRule) -> str:
    keys = [f"ttt.eta (it is {rule.eta:g})"]
    if rule.clip.mode is not ClipMode.off:
        keys.append(f"ttt.clip.bound (it is {rule.clip.bound:g})")
    if rule.write.kind is WriteKind.bounded:
        keys.append(f"ttt.write.bound (it is {rule.write.bound:g})")
    if rule.decay < 1:
        keys.append(f"ttt.decay (it is {rule.decay:g})")
    return f"raise {' or '.join(keys)}"


def _normalize(rule: UpdateRule) -> str:
    if rule.normalize is Normalize.key_energy:
        return ""
    return ". For the next training ttt.normalize=key_energy, which makes eta dimensionless"


def _switch_on(rule: UpdateRule) -> str:
    off = ["ttt.conv=learned"] if rule.conv is Conv.off else []
    off += [] if rule.proj else ["ttt.proj=true"]
    return f"; and train with {' '.join(off)}, so that targets differ" if off else ""


def _tame(rule: UpdateRule) -> str:
    return f"{_lower_eta(rule)}; {_bound_chunk(rule)}; {_forget(rule)}"


def _spread_keys(rule: UpdateRule) -> str:
    return (
        f"train longer; choose other ttt.layers, whose keys differ more; {_forget(rule)}, which"
        " keeps the common part from adding up over chunks"
    )


CONCERNS = (
    Concern(
        figure="loss with fast weights on minus off",
        of=lambda health: {"": health.loss_on - health.loss_off},
        within=Range(high=NOISE),
        reason="the same weights predict these rows better without their memory",
        advice=lambda rule: (
            f"{_tame(rule)}. All three can be tried on this checkpoint as it is{_normalize(rule)}"
        ),
    ),
    Concern(
        figure="update ratio",
        of=_by_layer(lambda layer: max(layer.update_ratio)),
        within=Range(high=BEARABLE[1]),
        reason="a pretrained W0 bears about 5 % of noise and breaks at 10 to 20 %, and fast"
        " weights gain nothing here",
        advice=_tame,
        evidence=Evidence.WITHOUT_GAIN,
    ),
    Concern(
        figure="update ratio",
        of=_by_layer(lambda layer: max(layer.update_ratio)),
        within=Range(low=1e-6),
        reason="nothing is written; the convolution is zero before the first step of training",
        advice=lambda rule: f"train; or, if it has been trained, {_write_more(rule)}",
    ),
    Concern(
        figure="output ratio",
        of=_by_layer(_largest_output),
        within=Range(low=0.01),
        reason="the state hardly changes the output; under 0.004 bf16 rounds it away",
        advice=lambda rule: f"{_write_more(rule)}, or train longer",
    ),
    Concern(
        figure="growth of the update ratio per doubling of the tokens read",
        of=_growth,
        within=Range(high=1.6),
        reason="2 is a sum of equal writes, 1.4 one of unrelated ones; on longer rows the state"
        " dominates W0",
        advice=lambda rule: (
            f"to bound the sum {_forget(rule)}; or for longer rows {_lower_eta(rule)}"
        ),
    ),
    Concern(
        figure="mean-key share",
        of=_by_layer(_mean_key_share),
        within=Range(high=0.5),
        reason="most of a write lies along the mean key, which all queries read alike: a bias, not"
        " a memory",
        advice=_spread_keys,
    ),
    Concern(
        figure="effective rank at the last place",
        of=_by_layer(_last_rank),
        within=Range(low=2.0),
        reason="the state is one direction, however much was read",
        advice=lambda rule: f"{_spread_keys(rule)}{_switch_on(rule)}",
    ),
    Concern(
        figure="share of conv in the squared gradient norm",
        of=_by_layer(lambda layer: layer.gradient_shares.get("conv")),
        within=Range(high=0.5),
        reason="one small convolution leads the step; reported before losses that explode",
        advice=lambda rule: (
            f"{_lower_eta(rule)}, keep optimizer.clip_grad=1, lengthen optimizer.warmup_steps"
        ),
    ),
    Concern(
        figure="share of conv and proj in the squared gradient norm",
        of=_by_layer(_target_share),
        within=Range(low=1e-12),
        reason="the target generator does not learn; conv and projection both zero never do",
        advice=lambda rule: (
            "start the projection from a diagonal of initializer_range (a fresh one does), or"
            f" {_write_more(rule)}"
        ),
    ),
)


def plain_values(health: Health) -> dict[str, Any]:
    """Return the report for the JSON file; ``None`` where there is no number."""
    values = asdict(health)
    values["loss"] = {"in_place": values.pop("loss_on"), "off": values.pop("loss_off")}
    return {"mean": "arithmetic, over rows", **_plain(values)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
