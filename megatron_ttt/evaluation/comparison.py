"""Runs against each other, over seeds: what a setting gains, and where in the text.

Reads what ``task=perplexity`` wrote, for several runs, or for one that was read under several
update rules. Results that differ in nothing but ``train.seed`` form one setting; a setting's gain
is the mean over seeds of its loss minus that of the baseline (trained without fast weights) of the
same seed, over the same text.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ttt.config.faults import show
from megatron_ttt.config.run_directory import flatten
from megatron_ttt.evaluation.drawing import BETTER, WORSE, finish, mark_window, name_groups, panels
from megatron_ttt.evaluation.report import Report, Table

BASELINE = "ttt=off"
READ = "read "  # before the keys of an update rule under which a run was read, not trained
REFERENCE = "reference"  # of the setting that differs from the most frequent values in nothing
_COLOURS = ("#475569", "#c2410c", "#0f766e", "#7c3aed", "#a16207", "#be185d", "#1d4ed8", "#4d7c0f")
# What may differ between runs of one setting, and is not a setting.
_NO_SETTING = ("run", "checkpoint", "logging", "validation", "data.workers", "train.seed")


@dataclass(frozen=True)
class Result:
    """One run's evaluation.

    Attributes:
        path: of the file.
        settings: the run's configuration by dotted key, without what is not a setting; and what was
            changed of its update rule for this reading, behind ``READ``.
        seed: of the run.
        shape: of the text: tokens of a row, rows, bins.
        digest: of the text; ``None`` in results of versions that did not note it.
        starts: first position of each bin.
        window: of the attention, tokens; 0: no window.
        losses: by bin, read as it was trained, nats a token.
        losses_off: the same weights with fast weights off; ``None`` if they were not read so.
    """

    path: Path
    settings: dict[str, Any]
    seed: int
    shape: tuple[int, int, int]
    digest: str | None
    starts: tuple[int, ...]
    window: int
    losses: tuple[float, ...]
    losses_off: tuple[float, ...] | None

    @property
    def has_fast_weights(self) -> bool:
        return self.settings["ttt.mode"] != "off"

    def beyond(self, losses: Sequence[float]) -> float:
        """Loss per token over the bins that begin at or beyond the attention's window."""
        return mean(
            loss for start, loss in zip(self.starts, losses, strict=True) if start >= self.window
        )


def read_result(path: Path) -> Result:
    """Read what ``task=perplexity`` wrote.

    Raises:
        ValueError: the file is not an evaluation of a run's perplexity; one line.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        trained, read = flatten(document["trained"]), flatten({"ttt": document["ttt"]})
        changed = {
            f"{READ}{key}": value for key, value in read.items() if value != trained.get(key)
        }
        readings = document["readings"]
        own, off = readings[trained["ttt.mode"]], readings.get("off")
        return Result(
            path=path,
            settings={k: v for k, v in trained.items() if not _excluded(k)} | changed,
            seed=trained["train.seed"],
            shape=(document["length"], document["rows"], len(document["bins"])),
            digest=document.get("text_sha256"),
            starts=tuple(first for first, _ in document["bins"]),
            window=document["sliding_window"] or 0,
            losses=tuple(own["loss_by_position"]),
            losses_off=None if off is None else tuple(off["loss_by_position"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: no result of task=perplexity of a run ({reason})") from error


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seeds alone.

    Attributes:
        ttt: what is changed of ``ttt.*``; "ttt=off" for a baseline.
        rest: what is changed of everything else: a baseline has to share it.
        by_seed: the runs.
    """

    ttt: str
    rest: str
    by_seed: dict[int, Result]

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.ttt, self.rest) if part) or REFERENCE

    @property
    def is_baseline(self) -> bool:
        return self.ttt == BASELINE

    def beyond(self) -> list[float]:
        """Loss beyond the window, by seed."""
        return [result.beyond(result.losses) for result in self.by_seed.values()]

    def beyond_off(self) -> dict[int, float]:
        """Return the same with fast weights off, by seed, where they were read so."""
        return {
            seed: run.beyond(run.losses_off)
            for seed, run in self.by_seed.items()
            if run.losses_off is not None
        }

    def gains(self, settings: Sequence[Setting]) -> list[float]:
        """Return loss beyond the window minus the baseline's, for every seed that both have.

        The baseline is the one of ``settings`` that shares everything but ``ttt.*``; a baseline
        itself has no gains.
        """
        if self.is_baseline:
            return []
        return [
            result.beyond(result.losses) - other.beyond(other.losses)
            for setting in settings
            if setting.is_baseline and setting.rest == self.rest
            for seed, result in self.by_seed.items()
            if (other := setting.by_seed.get(seed)) is not None
        ]


def group(results: Sequence[Result]) -> list[Setting]:
    """Return settings, baselines first, then by their mean loss beyond the window.

    A setting is named by the keys in which it differs from the most frequent value.

    Raises:
        ValueError: results of different texts, or one seed of a setting twice.
    """
    _check_texts(results)
    keys = {key for result in results for key in result.settings} - {"ttt.mode"}
    trained = [result for result in results if result.has_fast_weights] or results
    usual = {
        key: _most_frequent(
            [r.settings.get(key) for r in (trained if key.startswith("ttt.") else results)]
        )
        for key in sorted(keys)
        if not key.startswith(READ)  # a changed reading is always named
    }
    settings: dict[tuple[str, str], dict[int, Result]] = defaultdict(dict)
    for result in results:
        runs = settings[_labels(result, usual)]
        if result.seed in runs:
            raise ValueError(
                f"{result.path} and {runs[result.seed].path}: the same setting and seed"
            )
        runs[result.seed] = result
    made = [Setting(*labels, dict(sorted(runs.items()))) for labels, runs in settings.items()]
    return sorted(made, key=lambda s: (not s.is_baseline, mean(s.beyond())))


def compare(results: Sequence[Result]) -> Report:
    """Return the table, values and picture of all settings.

    Raises:
        ValueError: see :func:`group`.
    """
    settings = group(results)
    gains = {setting.label: setting.gains(settings) for setting in settings}
    values = [_values(setting, gains[setting.label]) for setting in settings]
    return Report(
        [_table(settings, gains)],
        {"settings": values},
        draw=partial(_draw, settings, gains),
        warnings=_unnamed_texts(results),
    )


def _check_texts(results: Sequence[Result]) -> None:
    """Check that all results are about the same text.

    Raises:
        ValueError: two results are not about the same text; names both.
    """
    first = results[0]
    named = next((result for result in results if result.digest is not None), first)
    for result in results:
        if result.shape != first.shape:
            raise ValueError(
                f"{result.path} and {first.path} read other text: (length, rows, bins) is"
                f" {result.shape} and {first.shape}"
            )
        if result.digest is not None and result.digest != named.digest:
            raise ValueError(
                f"{result.path} and {named.path} read other text of the same length:"
                f" text_sha256 is {result.digest} and {named.digest}"
            )


def _unnamed_texts(results: Sequence[Result]) -> list[str]:
    """Return a warning if some results, of an older version, do not name their text."""
    without = [result.path for result in results if result.digest is None]
    if not without:
        return []
    return [
        f"{len(without)} of {len(results)} results have no text_sha256 ({without[0]}): whether all"
        " read the same text is not known; evaluate again to find out"
    ]


def _labels(result: Result, usual: Mapping[str, Any]) -> tuple[str, str]:
    changed = {key: value for key, value in result.settings.items() if value != usual.get(key)}
    changed.pop("ttt.mode", None)
    parts = {
        own: " ".join(
            f"{key}={show(value)}"
            for key, value in changed.items()
            if key.removeprefix(READ).startswith("ttt.") is own
        )
        for own in (True, False)
    }
    return (parts[True] if result.has_fast_weights else BASELINE), parts[False]


def _most_frequent(values: Sequence[Any]) -> Any:
    counts = Counter(json.dumps(value, sort_keys=True) for value in values)
    return json.loads(counts.most_common(1)[0][0])


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _table(settings: Sequence[Setting], gains: Mapping[str, Sequence[float]]) -> Table:
    columns = [("setting", ""), ("seeds", "d"), ("loss", ".4f")]
    columns += [("loss beyond the window", ".4f"), ("± s.d.", ".4f")]
    columns += [("the same, fast weights off", ".4f")]
    columns += [("gain on the baseline", "+.4f"), ("± s.d.", ".4f")]
    rows = []
    for setting in settings:
        far, gained = setting.beyond(), gains[setting.label]
        off = [] if setting.is_baseline else list(setting.beyond_off().values())
        loss = mean(mean(run.losses) for run in setting.by_seed.values())
        row = [setting.label, len(far), loss, mean(far), _spread(far), _mean(off)]
        rows.append([*row, _mean(gained), _spread(gained)])
    length, count, _ = next(iter(settings[0].by_seed.values())).shape
    title = f"Loss, nats a token, {count} rows of {length} tokens; gain: paired by seed"
    return Table(title, columns, rows)


def _values(setting: Setting, gains: Sequence[float]) -> dict[str, Any]:
    runs = setting.by_seed
    return {
        "setting": setting.label,
        "seeds": list(runs),
        "files": [str(run.path) for run in runs.values()],
        "loss_by_position": {seed: run.losses for seed, run in runs.items()},
        "loss_beyond_window": dict(zip(runs, setting.beyond(), strict=True)),
        "fast_weights_off": setting.beyond_off(),
        "gains": list(gains),
    }


def _draw(settings: Sequence[Setting], gains: Mapping[str, Sequence[float]]) -> Figure:
    """Draw loss by position of the settings with most seeds, and the gains of all."""
    figure, ((left, right),) = panels(2, size=(12, 4.6), width_ratios=[1.2, 1])
    most = max(len(setting.by_seed) for setting in settings)
    chosen = [setting for setting in settings if len(setting.by_seed) == most]
    for setting, colour in zip(chosen, _COLOURS, strict=False):
        _draw_losses(left, setting, colour)
    mark_window(left, next(iter(settings[0].by_seed.values())).window)
    left.set(xlabel="position, tokens", ylabel="loss, nats a token", title="Loss by position")
    gained = {label: found for label, found in gains.items() if found}
    means = [mean(found) for found in gained.values()]
    right.barh(
        range(len(means)),
        means,
        xerr=[_spread(found) or 0.0 for found in gained.values()],
        color=[BETTER if gain < 0 else WORSE for gain in means],
        ecolor="0.3",
        alpha=0.8,
    )
    name_groups(right, list(gained))
    right.axvline(0, color="0.3", linewidth=0.8)
    right.set(xlabel="nats a token, less is better", title="Gain on ttt=off, beyond the window")
    return finish(figure)


def _draw_losses(axes: Axes, setting: Setting, colour: str) -> None:
    """Mean over seeds in steps of bins, and a band of one standard deviation."""
    runs = list(setting.by_seed.values())
    by_bin = list(zip(*(run.losses for run in runs), strict=True))
    centre = [mean(losses) for losses in by_bin]
    spread = [_spread(losses) or 0.0 for losses in by_bin]
    ends = [*runs[0].starts[1:], runs[0].shape[0]]
    places = [(start + end) / 2 for start, end in zip(runs[0].starts, ends, strict=True)]
    axes.plot(places, centre, color=colour, label=f"{setting.label}, {len(runs)} seeds")
    low, high = ([c + sign * s for c, s in zip(centre, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)


def _excluded(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _NO_SETTING)
