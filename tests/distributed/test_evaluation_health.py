"""The health report's states are the model's, its gradient autograd's, on every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import Config, Toggle, TTTMode
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.conversion.opened import Checkpoint
from megatron_ttt.data.rows import Batch
from megatron_ttt.evaluation.health_advice import PARTS, Health
from megatron_ttt.evaluation.health_figures import measure_health
from megatron_ttt.evaluation.health_probe import entering_states
from megatron_ttt.evaluation.report import print_report, write_report
from megatron_ttt.evaluation.subject import Subject
from megatron_ttt.evaluation.tasks import health
from megatron_ttt.fast_weights.reference import reference_fast_weight, reference_target
from megatron_ttt.model.build import build_model
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.initialize import global_parameters, initialize
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.rule import Clip, ClipMode, Normalize, TargetSource
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.step import ForwardStep
from tests.distributed.training_runs import global_batch, live_draw, tiny_config
from tests.pool import RankPool

ROWS = 3  # data-parallel ranks get two and one
PLACES = 4
CHUNKS_LOOKED_AT = [1, 4, 9, 15]


def config_of(*, everything: bool = True, **layout: Any) -> Config:
    """Documents and padding; with ``everything`` also decay, clip and key energy."""
    rule: dict[str, Any] = {"eta": 0.003}
    fast: dict[str, Any] = {}
    if everything:
        rule = {
            "target": TargetSource.input_embeddings,
            "normalize": Normalize.key_energy,
            "eta": 0.05,
        }
        fast = {"decay": 0.8, "clip": Clip(ClipMode.relative, 0.03)}
    config = tiny_config(sequence_parallel=Toggle.off, **rule, **layout)
    return replace(config, ttt=replace(config.ttt, **fast))


@contextmanager
def subject_of(config: Config) -> Iterator[Subject]:
    with megatron_on_cpu(), model_parallel(config) as ranks:
        model = build_model(config, transformer_config(config, device_is_cuda=False), ranks.groups)
        groups = ranks.groups
        initialize(
            model,
            seed=config.train.seed,
            vocab_size=config.model.vocab_size,
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
            draw=live_draw,
        )
        source = Checkpoint(Path("none"), "tiny", None, None, config.model, config.ttt, {})
        modes = [TTTMode.in_place, TTTMode.off]
        yield Subject(source, config, ranks, model.eval(), modes, None, seed=1)


def rows_of(config: Config, ranks: Ranks) -> list[Batch]:
    """Every ``data_size``-th row is this rank's, one at a time; alone, all at once."""
    batch = global_batch(config, 0, packed=True)
    mine = [list(range(ROWS))]
    if ranks.data_size > 1:
        mine = [[row] for row in range(ranks.data_rank, ROWS, ranks.data_size)]
    return [
        Batch(**{name: value[numbers] for name, value in vars(batch).items()}) for numbers in mine
    ]


def health_of(rank: int, ranks: int, config: Config) -> Health:
    with subject_of(config) as subject:
        rows = rows_of(config, subject.ranks)
        return measure_health(subject, rows, positions=PLACES)


@pytest.fixture(scope="module")
def one_rank(pool: RankPool) -> Health:
    return pool.run(health_of, config_of(), ranks=1)[0]


@pytest.mark.parametrize("layout", [{"tp": 2}, {}], ids=["tp=2", "dp=2"])
def test_two_ranks_report_what_one_does(
    pool: RankPool, one_rank: Health, layout: dict[str, int]
) -> None:
    assert [layer.layer for layer in one_rank.layers] == [0, 3]
    largest = [max(layer.update_ratio) for layer in one_rank.layers]
    assert min(largest) > 0.05 and max(largest) < 0.3
    assert one_rank.rows == ROWS and one_rank.loss_on != one_rank.loss_off
    for found in pool.run(health_of, config_of(**layout), ranks=2):
        for mine, theirs in zip(flat(asdict(found)), flat(asdict(one_rank)), strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4, nan_ok=True)


def flat(values: Any) -> list[float]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [number for value in values for number in flat(value)]
    return [values]


def report_of(rank: int, ranks: int, config: Config, folder: Path) -> str:
    """The report as printed; its files in ``folder``."""
    with subject_of(config) as subject:
        rows = rows_of(config, subject.ranks)
        report = health.report_of(measure_health(subject, rows, positions=PLACES), config.ttt)
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    write_report(report, folder, name="health", about={})
    return console.file.getvalue()


def test_the_report_shows_and_keeps_what_was_measured(
    pool: RankPool, one_rank: Health, tmp_path: Path
) -> None:
    (printed,) = pool.run(report_of, config_of(), tmp_path, ranks=1)
    values = json.loads((tmp_path / "health.json").read_text())
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
    assert values["positions"] == [32, 64, 88, 120]
    assert values["loss"] == {"in_place": one_rank.loss_on, "off": one_rank.loss_off}
    for layer, found in zip(values["layers"], one_rank.layers, strict=True):
        assert layer["update_ratio"] == pytest.approx(found.update_ratio)
        assert f"{found.update_ratio[-1]:.3g}" in printed
        assert f"{found.gradient_shares['conv']:.3%}" in printed
    for warning in values["warnings"]:
        assert f"warning: {warning}" in printed


def states_of(
    rank: int, ranks: int, config: Config, chunks: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per fast layer and chunk: the probe's state, the reference's, and the model's squares."""
    with subject_of(config) as subject, torch.no_grad():
        (batch,) = rows_of(config, subject.ranks)
        seen = []

        def look(mlp: FastWeightMLP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layout = kwargs["padding_mask"]
            inputs = args[0].transpose(0, 1)
            pairs = mlp.keys_and_write(args[0], layout)
            for chunk, state in entering_states(mlp, *pairs, layout.plan, chunks):
                expected = reference_state(mlp, inputs, layout.embeddings, batch, config, chunk)
                seen.append((layout, mlp.layer, chunk, state.clone(), expected))

        for layer in subject.model.decoder.layers:
            if isinstance(layer.mlp, FastWeightMLP):
                layer.mlp.register_forward_pre_hook(look, with_kwargs=True)
        step = ForwardStep(
            config,
            subject.ranks,
            scan=scan_settings(config.parallel, subject.ranks.scan_group),
            mode=TTTMode.in_place,
            wants_norms=True,
        )
        step(iter([batch]), subject.model)
        return [
            (state, expected, layout.state_squares[layer][:, chunk])
            for layout, layer, chunk, state, expected in seen
        ]


def reference_state(
    mlp: FastWeightMLP,
    inputs_BTD: Tensor,
    embeddings_TBD: Tensor | None,
    batch: Batch,
    config: Config,
    chunk: int,
) -> Tensor:
    """The state entering ``chunk`` in fp64, from weights and the layer's input alone."""
    ttt, size = config.ttt, config.ttt.chunk_size
    gate, up = (inputs_BTD.double() @ mlp.linear_fc1.weight.double().T).chunk(2, dim=-1)
    source = inputs_BTD if embeddings_TBD is None else embeddings_TBD.transpose(0, 1)
    read = slice(0, chunk * size)
    starts, padding = batch.document_starts_BT[:, read], batch.padding_BT[:, read]
    targets = reference_target(
        source[:, read].double(),
        mlp.ttt_conv.weight.double(),
        mlp.ttt_proj.weight.double(),
        chunk_size=size,
        document_starts=starts,
        padding=padding,
        normalize=ttt.normalize,
    )
    _, state = reference_fast_weight(
        (torch.nn.functional.silu(gate) * up)[:, read],
        targets,
        mlp.linear_fc2.weight.double(),
        eta=ttt.eta,
        chunk_size=size,
        document_starts=starts,
        padding=padding,
        decay=ttt.decay,
        clip=ttt.clip,
        normalize=ttt.normalize,
    )
    return state


@pytest.mark.parametrize("everything", [True, False])
def test_states_are_the_models_and_the_references(pool: RankPool, everything: bool) -> None:
    config = config_of(everything=everything)
    (found,) = pool.run(states_of, config, CHUNKS_LOOKED_AT, ranks=1)
    assert len(found) == 2 * len(CHUNKS_LOOKED_AT)
    for state, expected, squares in found:
        assert expected.flatten(1).norm(dim=1).max() > 0
        error = (state - expected).norm() / expected.norm()
        assert error < 1e-5
        found_squares = state.flatten(1).norm(dim=1).square()
        torch.testing.assert_close(found_squares, squares, check_dtype=False)  # summed in fp64


def test_every_part_of_that_rule_changes_the_states(pool: RankPool) -> None:
    config = config_of()
    ((whole, *_), *_) = pool.run(states_of, config, [15], ranks=1)[0]
    for change in (
        {"decay": 1.0},
        {"clip": Clip()},
        {"normalize": Normalize.none},
    ):
        other = replace(config, ttt=replace(config.ttt, **change))
        ((changed, *_), *_) = pool.run(states_of, other, [15], ranks=1)[0]
        assert (changed - whole).norm() / whole.norm() > 0.01, change


def plain_gradient(rank: int, ranks: int, config: Config) -> tuple[float, dict[str, float]]:
    """Loss and squared gradient norm of each parameter, by ``backward`` alone."""
    with subject_of(config) as subject:
        (batch,) = rows_of(config, subject.ranks)
        scan = scan_settings(config.parallel, subject.ranks.scan_group)
        step = ForwardStep(config, subject.ranks, scan=scan, mode=TTTMode.in_place)
        losses, _ = step(iter([batch]), subject.model)
        loss = (losses * batch.loss_mask_BT).sum() / batch.loss_mask_BT.sum()
        loss.backward()
        squares = {}
        for name, parameter in global_parameters(subject.model):
            assert parameter.grad is not None, name
            squares[name] = float(parameter.grad.double().square().sum())
        return float(loss), squares


def test_gradient_shares_are_autograds(pool: RankPool, one_rank: Health) -> None:
    ((loss, squares),) = pool.run(plain_gradient, config_of(), ranks=1)
    total = sum(squares.values())
    assert one_rank.loss_on == pytest.approx(loss, rel=1e-5)
    assert one_rank.gradient_norm == pytest.approx(math.sqrt(total), rel=1e-4)
    for layer in one_rank.layers:
        assert layer.gradient_shares.keys() == PARTS.keys()
        for part, name in PARTS.items():
            share = squares[f"decoder.layers.{layer.layer}.{name}"] / total
            assert share > 1e-6
            assert layer.gradient_shares[part] == pytest.approx(share, rel=1e-3)


def refusal(rank: int, ranks: int, config: Config, rows: int, length: int) -> str:
    """What ``measure_health`` says of so many rows, dealt to data-parallel ranks."""
    with subject_of(config) as subject:
        batch = global_batch(config, 0, packed=True)
        cut = Batch(
            **{
                name: value[:rows, :length] if value.ndim == 2 else value[:rows]
                for name, value in vars(batch).items()
            }
        )
        mine = [cut] if subject.ranks.data_rank == 0 else []
        with pytest.raises(ConfigError) as caught:
            measure_health(subject, mine, positions=8)
        return str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "layout", "length", "message"),
    [
        (2, {"cp": 2}, 128, "parallel.cp=2: must be 1"),
        (2, {}, 128, "health.rows=1: leaves some of 2 data-parallel ranks without a row"),
        (1, {}, 8, "health.length=8: is no longer than a chunk (ttt.chunk_size=8)"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_on_every_rank(
    pool: RankPool, ranks: int, layout: dict[str, int], length: int, message: str
) -> None:
    for said in pool.run(refusal, config_of(**layout), 1, length, ranks=ranks):
        assert said.startswith(message) and "\n" not in said
