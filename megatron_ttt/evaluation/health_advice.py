"""What a health report shows, which figures are out of their range, and what helps.

:data:`CONCERNS` is the one table of ranges, reasons and advice. Some bounds hold only for weights
that never learnt to expect a memory (continued pretraining, its first steps): a model trained from
scratch can live with updates larger than W0. So they are asked about only where the same rows are
*not* predicted better with fast weights on than off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

NOISE = 0.002  # nats a token: differences of two losses over few rows that mean nothing
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


class Side(Enum):
    """On which side of its limit a figure is ill."""

    ABOVE = "above"
    BELOW = "below"


class Evidence(Enum):
    """When a range is asked about."""

    ALWAYS = "always"
    WITHOUT_GAIN = "without gain"


@dataclass(frozen=True)
class Concern:
    """One way of being ill.

    Attributes:
        figure: what is looked at, as the warning calls it.
        of: the figure by place; ``""`` for the whole model. Places without one are missing.
        side, limit: where illness begins.
        reason: why there.
        advice: what to try, in the order of trying.
        evidence: whether the losses can acquit.
    """

    figure: str
    of: Callable[[Health], Mapping[str, float]]
    side: Side
    limit: float
    reason: str
    advice: str
    evidence: Evidence = Evidence.ALWAYS

    def warning(self, health: Health) -> str | None:
        """One line that names figure, places and advice; ``None`` if all is well."""
        if self.evidence is Evidence.WITHOUT_GAIN and health.gains:
            return None
        ill = {place: value for place, value in self.of(health).items() if self._is_ill(value)}
        if not ill:
            return None
        found = ", ".join(f"{place} {value:.3g}".strip() for place, value in ill.items())
        return (
            f"{self.figure} {self.side.value} {self.limit:g}: {found}"
            f" ({self.reason}). {self.advice}"
        )

    def _is_ill(self, value: float) -> bool:
        # What is no number is ill on either side.
        within = value <= self.limit if self.side is Side.ABOVE else value >= self.limit
        return not within


def warnings_of(health: Health) -> list[str]:
    """Every concern that is raised, in the table's order."""
    lines = (concern.warning(health) for concern in CONCERNS)
    return [line for line in lines if line is not None]


def _layers(
    health: Health, figure: Callable[[LayerHealth], float | None]
) -> Iterator[tuple[str, float]]:
    for layer in health.layers:
        value = figure(layer)
        if value is not None:
            yield f"layer {layer.layer}", value


def _loss_difference(health: Health) -> dict[str, float]:
    return {"": health.loss_on - health.loss_off}


def _largest_update(health: Health) -> dict[str, float]:
    return dict(_layers(health, lambda layer: max(layer.update_ratio)))


def _largest_output(health: Health) -> dict[str, float]:
    """Of layers that write at all; what they write nothing about is another concern."""

    def largest(layer: LayerHealth) -> float | None:
        outputs = _known(layer.output_ratio)
        return max(outputs) if outputs and max(layer.update_ratio) > 0 else None

    return dict(_layers(health, largest))


def _growth(health: Health) -> dict[str, float]:
    """Update ratio at the last place over that at half its tokens, where it is large at last."""
    if len(health.positions) < _GROWTH_PLACES:
        return {}
    half = health.positions[-1] / 2
    middle = min(range(len(health.positions)), key=lambda p: abs(health.positions[p] - half))
    # Places are seldom at exactly half: growth is measured per doubling of the tokens read.
    doublings = math.log2(health.positions[-1] / health.positions[middle])

    def growth(layer: LayerHealth) -> float | None:
        last, before = layer.update_ratio[-1], layer.update_ratio[middle]
        if not last > _UPDATE_LIMIT or not 0 < before < math.inf:
            return None
        return float((last / before) ** (1 / doublings))

    return dict(_layers(health, growth))


def _mean_key_share(health: Health) -> dict[str, float]:
    def mean(layer: LayerHealth) -> float | None:
        shares = _known(layer.mean_key_share)
        return sum(shares) / len(shares) if shares else None

    return dict(_layers(health, mean))


def _last_rank(health: Health) -> dict[str, float]:
    def last(layer: LayerHealth) -> float | None:
        ranks = _known(layer.effective_rank)
        return ranks[-1] if ranks else None

    return dict(_layers(health, last))


def _conv_share(health: Health) -> dict[str, float]:
    return dict(_layers(health, lambda layer: layer.gradient_shares.get("conv")))


def _target_share(health: Health) -> dict[str, float]:
    """Conv and projection together, of layers that have one."""

    def share(layer: LayerHealth) -> float | None:
        parts = [layer.gradient_shares[p] for p in ("conv", "proj") if p in layer.gradient_shares]
        return sum(parts) if parts else None

    return dict(_layers(health, share))


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


_UPDATE_LIMIT = 0.3
_TAME = "Lower ttt.eta; bound a chunk with ttt.clip.mode=relative ttt.clip.bound=0.1"
CONCERNS = (
    Concern(
        figure="loss with fast weights on minus off",
        of=_loss_difference,
        side=Side.ABOVE,
        limit=NOISE,
        reason="the same weights predict these rows better without their memory",
        advice=f"{_TAME}; forget with ttt.decay=0.9. All three can be tried on this checkpoint as"
        " it is. For the next training ttt.normalize=key_energy, which makes eta dimensionless",
    ),
    Concern(
        figure="update ratio",
        of=_largest_update,
        side=Side.ABOVE,
        limit=_UPDATE_LIMIT,
        reason="a pretrained W0 bears about 5 % of noise and breaks at 10 to 20 %, and fast"
        " weights gain nothing here",
        advice=f"{_TAME}; or ttt.decay=0.9",
        evidence=Evidence.WITHOUT_GAIN,
    ),
    Concern(
        figure="update ratio",
        of=_largest_update,
        side=Side.BELOW,
        limit=1e-6,
        reason="nothing is written; the convolution is zero before the first step of training",
        advice="Train; or raise ttt.eta or ttt.clip.bound if it has been trained",
    ),
    Concern(
        figure="output ratio",
        of=_largest_output,
        side=Side.BELOW,
        limit=0.01,
        reason="what is remembered is hardly heard; under 0.004 bf16 rounds it away",
        advice="Raise ttt.eta, ttt.clip.bound or ttt.decay, or train longer",
    ),
    Concern(
        figure="growth of the update ratio per doubling of the tokens read",
        of=_growth,
        side=Side.ABOVE,
        limit=1.6,
        reason="2 is a sum of equal writes, 1.4 one of unrelated ones; longer rows drown W0",
        advice="Bound the sum with ttt.decay=0.9, or a lower ttt.eta for longer rows",
    ),
    Concern(
        figure="mean-key share",
        of=_mean_key_share,
        side=Side.ABOVE,
        limit=0.5,
        reason="most of a write lies along the mean key, which all queries read alike: a bias, not"
        " a memory",
        advice="Train longer; choose other ttt.layers, whose keys differ more; ttt.decay=0.9"
        " keeps the common part, which adds up over chunks, from covering the rest",
    ),
    Concern(
        figure="effective rank at the last place",
        of=_last_rank,
        side=Side.BELOW,
        limit=2.0,
        reason="the state is one direction, however much was read",
        advice="As for the mean-key share; and see that targets differ: ttt.conv and ttt.proj on",
    ),
    Concern(
        figure="share of conv in the squared gradient norm",
        of=_conv_share,
        side=Side.ABOVE,
        limit=0.5,
        reason="one small convolution leads the step; reported before losses that explode",
        advice="Lower ttt.eta, keep optimizer.clip_grad=1, lengthen optimizer.warmup_steps",
    ),
    Concern(
        figure="share of conv and proj in the squared gradient norm",
        of=_target_share,
        side=Side.BELOW,
        limit=1e-12,
        reason="the target generator does not learn; conv and projection both zero never do",
        advice="Start the projection from a diagonal of initializer_range (a fresh one does),"
        " or raise ttt.eta",
    ),
)


def plain_values(health: Health) -> dict[str, Any]:
    """For the JSON file; ``None`` where there is no number."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "length": health.length,
        "rows": health.rows,
        "mean": "arithmetic, over rows",
        "positions": list(health.positions),
        "loss": {"in_place": plain(health.loss_on), "off": plain(health.loss_off)},
        "gradient_norm": plain(health.gradient_norm),
        "layers": [
            {
                "layer": layer.layer,
                "update_ratio": [plain(value) for value in layer.update_ratio],
                "output_ratio": [plain(value) for value in layer.output_ratio],
                "effective_rank": [plain(value) for value in layer.effective_rank],
                "largest_rank": layer.largest_rank,
                "mean_key_share": [plain(value) for value in layer.mean_key_share],
                "gradient_shares": {
                    part: plain(share) for part, share in layer.gradient_shares.items()
                },
            }
            for layer in health.layers
        ],
    }
