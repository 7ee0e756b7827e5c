"""The task ``ruler``: eight kinds of questions about long contexts, with fast weights on and off.

The questions are generated (``ruler/``), after Hsieh et al., arXiv 2404.06654.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ttt.config.effects import Condition
from megatron_ttt.config.schema import TTTMode
from megatron_ttt.evaluation.report import MODE_NAMES, Report
from megatron_ttt.evaluation.ruler.sample import RulerTask
from megatron_ttt.evaluation.task import Reading, Task, Text
from megatron_ttt.evaluation.tasks._asked import BOUNDS, AskedConfig, Cells, asked_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ttt.evaluation.asking import Item
    from megatron_ttt.evaluation.schema import EvaluationConfig
    from megatron_ttt.evaluation.subject import Subject


@dataclass
class RulerConfig(AskedConfig):
    tasks: list[RulerTask] | None = None  # null: all


def items_of(settings: RulerConfig) -> list[Item]:
    """Return every sample, short ones first."""
    from megatron_ttt.evaluation.asking import Item

    return [
        Item(task, length, number)
        for length in sorted(set(settings.lengths))
        for task in _tasks(settings)
        for number in range(settings.samples)
    ]


def run(subject: Subject, settings: RulerConfig, config: EvaluationConfig) -> Report:
    """Ask and report; where there are several kinds, all of a length together come first."""
    return asked_report(
        subject,
        settings,
        items_of(settings),
        task="ruler",
        group="task",
        title="RULER-style tasks",
        together="all tasks" if len(_tasks(settings)) > 1 else None,
        label_text=str,
        draw=_draw,
    )


def _tasks(settings: RulerConfig) -> list[RulerTask]:
    return list(dict.fromkeys(settings.tasks or RulerTask))


def _hides_needles(config: Any) -> bool:
    return any(task.name.startswith("niah") for task in _tasks(config.ruler))


def _draw(cells: Cells, modes: Sequence[TTTMode]) -> Figure:
    """Draw scores above losses of the answer, one column a task; bars if there is one length."""
    from megatron_ttt.evaluation.asking import mean_loss, mean_score
    from megatron_ttt.evaluation.drawing import finish, panels, reading, token_axis

    names = list(dict.fromkeys(name for name, _ in cells))
    lengths = sorted({length for _, length in cells})
    if len(lengths) == 1:
        return _draw_bars(cells, names, lengths[0], modes)
    size = (1.2 + 1.75 * max(2, len(names)), 4.6)
    figure, grid = panels(len(names), 2, size=size, sharex=True, sharey="row")
    for column, name in enumerate(names):
        upper, lower = grid[:, column]
        for mode in modes:
            found = [cells[name, length] for length in lengths]
            upper.plot(lengths, [100 * mean_score(some, mode) for some in found], **reading(mode))
            losses = [mean_loss(some, mode) for some in found]
            lower.plot(lengths, losses, **reading(mode) | {"label": None})
        upper.set_title(name.replace("_", " "), fontsize=9)
        token_axis(lower, lengths)
    grid[0][0].set(ylabel="score, %", ylim=(-4, 104))
    grid[1][0].set(ylabel="answer loss, nats a token")
    figure.supxlabel("length, tokens", fontsize=9)
    return finish(figure)


def _draw_bars(cells: Cells, names: Sequence[str], length: int, modes: Sequence[TTTMode]) -> Figure:
    from megatron_ttt.evaluation.asking import mean_loss, mean_score
    from megatron_ttt.evaluation.drawing import MODE_COLOURS, bars, finish, name_groups, panels

    figure, ((left, right),) = panels(2, size=(10, 1.4 + 0.45 * len(names)), sharey=True)
    found = [cells[name, length] for name in names]
    for place, mode in enumerate(modes):
        scores = [100 * mean_score(some, mode) for some in found]
        losses = [mean_loss(some, mode) for some in found]
        for axes, values, form in ((left, scores, "%.0f"), (right, losses, "%.2f")):
            label, colour = MODE_NAMES[mode], MODE_COLOURS[mode]
            bars(axes, values, place=place, of=len(modes), label=label, colour=colour, form=form)
    name_groups(left, [name.replace("_", " ") for name in names])
    left.set(xlabel="score, %", xlim=(0, 108))
    right.set(xlabel="answer loss, nats a token")
    right.margins(x=0.12)
    figure.suptitle(f"Contexts of {length} tokens", fontsize=10)
    return finish(figure, axis="x")


TASK = Task(
    settings=RulerConfig,
    reading=Reading.SESSION,
    text=Text.GENERATED,
    lengths=lambda source, settings: {"ruler.lengths": settings.lengths},
    run=run,
    bounds=BOUNDS,
    effects={"haystack": (Condition("ruler.tasks", _hides_needles),)},
)
