"""How far a run has come, counted in what it consumed: a batch size may change on the way."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a run stood when the checkpoint was taken.

    Attributes:
        step: steps done.
        consumed_samples: rows of the training stream used, the data position.
        consumed_tokens: tokens of those rows.
        metrics_bytes: length of ``metrics.jsonl``.
        batches: (number of steps, samples in each of them), in order; a run whose batch size
            changed has several. Empty: not recorded, all steps took about the same.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    metrics_bytes: int
    batches: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, document: dict[str, Any]) -> "Progress":
        """Return what a manifest says; older ones have no ``batches``.

        Raises:
            ValueError, TypeError: the document is not a progress, or contradicts itself.
        """
        batches = tuple((steps, each) for steps, each in document.get("batches", ()))
        progress = cls(**{**document, "batches": batches})
        counts = [value for name, value in vars(progress).items() if name != "batches"]
        counts += [count for pair in batches for count in pair]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"progress holds something else than counts: {document}")
        steps = sum(number for number, _ in batches)
        samples = sum(number * each for number, each in batches)
        if batches and (steps, samples) != (progress.step, progress.consumed_samples):
            raise ValueError(f"progress does not add up: {document}")
        return progress

    def after_step(self, batch: int, *, seq_length: int) -> "Progress":
        """Where the run stands after one more step over ``batch`` samples."""
        batches = list(self._recorded())
        if batches and batches[-1][1] == batch:
            batches[-1] = (batches[-1][0] + 1, batch)
        else:
            batches.append((1, batch))
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + batch,
            consumed_tokens=self.consumed_tokens + batch * seq_length,
            batches=tuple(batches),
        )

    def samples_at(self, step: int, batch: int) -> int:
        """Return the samples consumed when ``step`` steps are done, ``batch`` in each to come."""
        samples = 0
        for steps, size in self._recorded():
            taken = min(step, steps)
            samples += taken * size
            step -= taken
        return samples + step * batch

    def _recorded(self) -> tuple[tuple[int, int], ...]:
        """``batches``, or what ``step`` and ``consumed_samples`` alone tell of them."""
        if self.batches or self.step == 0:
            return self.batches
        size, more = divmod(self.consumed_samples, self.step)
        stretches = ((self.step - more, size), (more, size + 1))
        return tuple(stretch for stretch in stretches if stretch[0])


BEGINNING = Progress(step=0, consumed_samples=0, consumed_tokens=0, metrics_bytes=0)
