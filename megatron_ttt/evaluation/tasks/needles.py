"""The task ``needles``: one needle at every depth of contexts of several lengths, as heat maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from megatron_ttt.config.bounds import COUNT
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.report import MODE_NAMES, Report
from megatron_ttt.evaluation.ruler.sample import RulerTask
from megatron_ttt.evaluation.task import Reading, Task, Text
from megatron_ttt.evaluation.tasks._asked import BOUNDS, AskedConfig, Cells, asked_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ttt.evaluation.asking import Answered, Item
    from megatron_ttt.evaluation.schema import EvaluationConfig
    from megatron_ttt.evaluation.subject import Subject


@dataclass
class NeedlesConfig(AskedConfig):
    """One needle at every depth and length."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    samples: int = 5  # per cell
    depths: int = 11  # evenly from 0 (the start) to 1 (the end)


def items_of(settings: NeedlesConfig) -> list[Item]:
    """Return every sample, short ones first; those of one length are the same at every depth."""
    from megatron_ttt.evaluation.asking import Item

    count = settings.depths
    depths = [place / (count - 1) for place in range(count)] if count > 1 else [0.5]
    return [
        Item(RulerTask.niah_single, length, number, depth)
        for length in sorted(set(settings.lengths))
        for depth in depths
        for number in range(settings.samples)
    ]


def run(subject: Subject, settings: NeedlesConfig, config: EvaluationConfig) -> Report:
    """Ask and report."""
    return asked_report(
        subject,
        settings,
        items_of(settings),
        task="needles",
        group="depth",
        title="One needle",
        together=None,
        label_text="{:.2f}".format,
        draw=_draw,
    )


def _draw(cells: Cells, modes: Sequence[TTTMode]) -> Figure:
    """Draw scores of every reading, and what fast weights change of the answer's loss."""
    from megatron_ttt.evaluation.asking import mean_loss, mean_score
    from megatron_ttt.evaluation.drawing import Scale, heat_map, panels

    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})

    def by_cell(value: Callable[[Sequence[Answered]], float]) -> list[list[float]]:
        return [[value(cells[depth, length]) for length in lengths] for depth in depths]

    def loss_of(mode: TTTMode) -> Callable[[Sequence[Answered]], float]:
        return partial(mean_loss, mode=mode)

    def percent_of(mode: TTTMode) -> Callable[[Sequence[Answered]], float]:
        return lambda some: 100 * mean_score(some, mode)

    scores = Scale((0, 100), "YlGn", ".0f")
    maps = [(f"score, %, {MODE_NAMES[mode]}", by_cell(percent_of(mode)), scores) for mode in modes]
    loss = "answer loss, nats a token"
    if len(modes) == 1:
        losses = by_cell(loss_of(modes[0]))
        maps.append((loss, losses, Scale((0, max(map(max, losses))), "Oranges", ".2f")))
    else:  # blue: the true answer is likelier with fast weights
        on, off = map(loss_of, modes)
        change = by_cell(lambda some: on(some) - off(some))
        reach = max(abs(value) for row in change for value in row) or 1.0
        maps.append((f"{loss}, on - off", change, Scale((-reach, reach), "RdBu_r", "+.2f")))
    width = 1.5 + max(1.8, 0.55 * len(lengths))
    size = (0.6 + len(maps) * width, 1.6 + 0.28 * len(depths))
    figure, (across,) = panels(len(maps), size=size, sharey=True)
    for axes, (title, values, scale) in zip(across, maps, strict=True):
        heat_map(figure, axes, values, scale)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_xlabel("length, tokens")
    across[0].set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths], fontsize=8)
    across[0].set_ylabel("depth of the needle")
    return figure


TASK = Task(
    settings=NeedlesConfig,
    reading=Reading.SESSION,
    text=Text.GENERATED,
    lengths=lambda source, settings: {"needles.lengths": settings.lengths},
    run=run,
    bounds={**BOUNDS, "depths": COUNT},
)
