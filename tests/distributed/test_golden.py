"""Losses, gradient norms and update ratios of short runs, as text in ``tests/golden``.

The text also says where it was written. On the same kind of processor, with the same versions of
torch and megatron-core, the run of one rank equals it digit for digit: whoever moves code and
changes no arithmetic sees that here. Elsewhere products are summed in another order (fp32), so
runs are compared within bounds there, as other layouts are everywhere.

    python -m tests.distributed.test_golden        # writes all files anew, here
"""

from dataclasses import replace
from pathlib import Path

import megatron.core
import pytest
import torch

from megatron_ttt.config.schema import Config
from megatron_ttt.rule import Clip, ClipMode, Normalize, TargetSource
from tests.distributed.training_runs import RunReport, run_training, tiny_config
from tests.pool import RankPool

FOLDER = Path(__file__).resolve().parents[1] / "golden"
STEPS = 6
LOSS_BOUND, NORM_BOUND, RATIO_BOUND = 2e-5, 5e-4, 1e-3
EXACT = {"one_rank", "one_rank_key_energy"}  # no collective whose order of summation may vary


def key_energy() -> Config:
    """What the published rule does not have, all at once."""
    config = tiny_config(
        target=TargetSource.input_embeddings, normalize=Normalize.key_energy, eta=0.05
    )
    clip = Clip(mode=ClipMode.relative, bound=0.1)
    return replace(config, ttt=replace(config.ttt, decay=0.9, clip=clip))


RUNS: dict[str, tuple[int, Config]] = {
    "one_rank": (1, tiny_config()),
    "one_rank_key_energy": (1, key_energy()),
    "cp2_zigzag": (2, tiny_config(cp=2)),
    "tp2_pp2": (4, tiny_config(tp=2, pp=2)),
    "dp2": (2, tiny_config()),
}


def here() -> str:
    """What decides the order in which products are summed."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model", "stepping")
    processor = " ".join(facts.get(name, "unknown") for name in names)
    capability = torch.backends.cpu.get_cpu_capability()
    core = megatron.core.__version__
    return f"torch {torch.__version__}, megatron-core {core}, {capability}, {processor}"


def rows_of(report: RunReport) -> list[list[float]]:
    """One row a step: loss, gradient norm, the ratios of the fast layers in order."""
    return [
        [loss, norm, *(ratios[layer] for layer in sorted(ratios))]
        for loss, norm, ratios in zip(report.losses, report.grad_norms, report.ratios, strict=True)
    ]


def as_text(rows: list[list[float]]) -> list[str]:
    """Every digit that a number has."""
    return [" ".join([str(step), *map(repr, row)]) for step, row in enumerate(rows, start=1)]


def train(pool: RankPool, name: str) -> list[list[float]]:
    ranks, config = RUNS[name]
    return rows_of(pool.run(run_training, config, STEPS, ranks=ranks, timeout=120)[0])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_was(pool: RankPool, name: str) -> None:
    place, _, *lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    rows = train(pool, name)
    if name in EXACT and place == f"# {here()}":
        assert as_text(rows) == lines
    for line, found in zip(lines, rows, strict=True):
        loss, norm, *ratios = map(float, line.split()[1:])
        assert min(ratios) > 0.02, "fast weights not alive"
        assert found[0] == pytest.approx(loss, rel=LOSS_BOUND)
        assert found[1] == pytest.approx(norm, rel=NORM_BOUND)
        assert found[2:] == pytest.approx(ratios, rel=RATIO_BOUND)


def write_all() -> None:
    pool = RankPool()
    FOLDER.mkdir(exist_ok=True)
    for name in RUNS:
        header = [f"# {here()}", "# step loss grad_norm update_ratio..."]
        lines = [*header, *as_text(train(pool, name))]
        (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")
    pool.close()


if __name__ == "__main__":
    write_all()
