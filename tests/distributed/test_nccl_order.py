"""NCCL could complete every launch of every layout: training, validation, saving, stopping.

Launches are recorded on gloo on the paths that CUDA takes (``tests/nccl``). The same checks must
find launches that were swapped, and ranks that launch in another order where gloo does not mind.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed import ProcessGroup

from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.config.schema import CheckpointConfig, Config, Recompute, Toggle, ValidationConfig
from megatron_ttt.data.batches import Batch, DataStreams
from megatron_ttt.parallel.scan_algorithms import ALGORITHMS
from megatron_ttt.scan_words import SequenceOrder
from megatron_ttt.training import checkpoint_saver, loop
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, SaveFailed, SaveMode
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.figures import PendingFigures
from megatron_ttt.training.loop import Trainer, build_saver, build_trainer
from megatron_ttt.training.metrics import Row
from megatron_ttt.training.resilience import StopRequest
from megatron_ttt.training.resume import BEGINNING
from tests.distributed.training_runs import (
    global_batch,
    live_draw,
    micro_batches_of,
    redraw,
    tiny_config,
)
from tests.nccl.cuda_paths import cuda_paths
from tests.nccl.launches import (
    COLLECTIVES,
    MESSAGES,
    REFUSED,
    SILENT,
    Launch,
    LaunchRecord,
    Message,
    recording,
)
from tests.nccl.replay import deadlock, differences, faults
from tests.pool import RankPool

STOP_AT = 4
LOSS_BOUND = 2e-5

FULL = {"recompute": Recompute.full}
SELECTIVE = {"recompute": Recompute.selective, "recompute_modules": ("core_attn", "mlp")}
CONTIGUOUS = {"cp_order": SequenceOrder.contiguous}
NO_SP = {"sequence_parallel": Toggle.off}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5_000}

Layout = tuple[int, dict[str, Any]]
SAVED = (2, {"tp": 2})
MIXED = (4, {"pp": 2, "cp": 2, **FULL})
LAYOUTS: list[Layout] = [
    SAVED,
    (2, {"tp": 2, **NO_SP, **SELECTIVE}),
    (2, {"cp": 2, **FULL}),
    (2, {"pp": 2}),
    (2, {"distributed_optimizer": False}),
    (2, {**OVERLAP, **FULL}),
    (4, {"cp": 4}),
    (4, {"cp": 4, **CONTIGUOUS, **SELECTIVE}),
    (4, {"tp": 2, "cp": 2, **SELECTIVE}),
    (4, {"tp": 2, "pp": 2}),
    MIXED,
    (4, {"cp": 2, **CONTIGUOUS, **OVERLAP, **FULL}),
    (4, {"pp": 2, **OVERLAP}),
]


def layout_id(layout: Layout) -> str:
    ranks, changes = layout
    words = [f"{key}={getattr(value, 'value', value)}" for key, value in changes.items()]
    return "-".join([f"{ranks} ranks", *words])


def configure(changes: dict[str, Any], folder: Path) -> Config:
    config = tiny_config(**changes)
    return replace(
        config,
        run=replace(config.run, dir=str(folder)),
        checkpoint=CheckpointConfig(interval=None),
        validation=ValidationConfig(interval=STOP_AT, batches=1),
        logging=replace(config.logging, sample_ids=True),
    )


@dataclass
class Life:
    """What one rank launched, and the losses of its steps."""

    launches: list[Launch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


Disturbance = Callable[[Trainer], AbstractContextManager[None]]


def undisturbed(trainer: Trainer) -> AbstractContextManager[None]:
    return nullcontext()


def record_life(
    rank: int, ranks: int, config: Config, disturbance: Disturbance = undisturbed
) -> Life:
    """Four steps, a validation, a stop that the last rank alone is asked for, and its save."""
    with recorded_life(rank, ranks, config, disturbance) as (life, _):
        return life


def record_saves(rank: int, ranks: int, config: Config) -> Life:
    """As :func:`record_life` with saves in the background; then one in the foreground, and some
    that fail on the last rank alone.
    """
    settings = CheckpointConfig(interval=2, async_save=True)
    config = replace(config, checkpoint=settings)
    with recorded_life(rank, ranks, config, undisturbed) as (life, saver):
        saver.mode = SaveMode.SYNCHRONOUS
        saver.save(progress_at(STOP_AT + 1))
        fail_to_save(saver, here=rank == ranks - 1)
        return life


@contextmanager
def recorded_life(
    rank: int, ranks: int, config: Config, disturbance: Disturbance
) -> Iterator[tuple[Life, CheckpointSaver]]:
    """Train as the configuration says until asked to stop; what follows is recorded as well."""
    life = Life()
    with ExitStack() as stack:
        stack.enter_context(cuda_paths())
        # A rank of the pool is a daemon, which may not fork; a save in the background does.
        own: Any = multiprocessing.current_process()
        stack.enter_context(mock.patch.dict(own._config, daemon=False))
        here = stack.enter_context(model_parallel(config))
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        stop = StopRequest()
        data = streams(trainer, stop if rank == ranks - 1 else None)
        saver = build_saver(trainer, Console(quiet=True), data={})
        Path(config.run.dir).mkdir(exist_ok=True)
        record = stack.enter_context(recording())
        life.launches = record.launches
        stack.enter_context(phases(record, trainer, saver, stop, life.losses))
        with disturbance(trainer):
            done = loop.train(trainer, data, BEGINNING, None, saver, stop, ours=lambda: True)
        assert not done, "nobody was asked to stop"
        saver.finish()
        yield life, saver


def progress_at(step: int) -> Progress:
    return Progress(step, 8 * step, 8 * 128 * step, 0)


def streams(trainer: Trainer, stop: StopRequest | None) -> DataStreams:
    """The training helpers' batches; ``stop`` is heard when the last step's rows are read."""
    config, ranks = trainer.config, trainer.ranks

    def train_rows() -> Iterator[Batch]:
        for step in range(config.train.steps):
            if stop is not None and step == STOP_AT - 1:
                stop.hear(signal.SIGTERM, None)
            yield from micro_batches_of(global_batch(config, step, packed=True), config, ranks)

    def validation_rows() -> Iterator[Batch]:
        return micro_batches_of(global_batch(config, 100, packed=True), config, ranks)

    nothing: Any = None
    return DataStreams(train_rows(), validation_rows, nothing, 0, 0)


@contextmanager
def phases(
    record: LaunchRecord,
    trainer: Trainer,
    saver: CheckpointSaver,
    stop: StopRequest,
    losses: list[float],
) -> Iterator[None]:
    """Name what is going on, keep the losses, and let each step scan by another algorithm."""
    whole_step = trainer.train_step

    def train_step(data: Any, **options: Any) -> Any:
        # each step scans by another one
        trainer.scan = replace(trainer.scan, algorithm=ALGORITHMS[len(losses)])
        with record.during("step"):
            return whole_step(data, **options)

    def keep_losses(_: object, rows: list[Row]) -> None:
        losses.extend(row["loss"] for row in rows)

    with (
        mock.patch.object(trainer, "train_step", train_step),
        mock.patch.object(loop, "_write", keep_losses),
        record.during_calls(PendingFigures, "rows", "report"),
        record.during_calls(trainer, "validation_loss", "validation"),
        record.during_calls(saver, "save", "save"),
        record.during_calls(saver, "poll", "poll"),
        record.during_calls(stop, "ranks_agree", "stop"),
    ):
        yield


def fail_to_save(saver: CheckpointSaver, *, here: bool) -> None:
    """Where ``here``, writing fails: in the background, in the foreground, before it begins."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    for mode, name in (
        (SaveMode.ASYNCHRONOUS, "_write_bucket"),
        (SaveMode.SYNCHRONOUS, "_write_bucket"),
        (SaveMode.SYNCHRONOUS, "_write"),
    ):
        saver.mode = mode
        with (
            mock.patch.object(checkpoint_saver, name, refuse) if here else nullcontext(),
            pytest.raises(SaveFailed, match="No space left"),
        ):
            saver.save(progress_at(STOP_AT + 2))
            saver.finish()


class Lives:
    """Recorded lives, each made once."""

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self._pool = pool
        self._folder = folder
        self._known: dict[str, list[Life]] = {}

    def of(self, layout: Layout, function: Callable[..., Life] = record_life) -> list[Life]:
        """One life per rank."""
        key = f"{layout_id(layout)} {function.__name__}"
        if key not in self._known:
            config = configure(layout[1], self._folder / str(len(self._known)))
            self._known[key] = self._pool.run(function, config, ranks=layout[0], timeout=150)
        return self._known[key]


@pytest.fixture(scope="module")
def lives(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return Lives(pool, tmp_path_factory.mktemp("lives"))


def launches_of(lives: list[Life]) -> list[list[Launch]]:
    return [life.launches for life in lives]


def test_one_rank_launches_nothing(lives: Lives) -> None:
    (alone,) = lives.of((1, {}))
    assert alone.launches == [] and len(alone.losses) == STOP_AT


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_nccl_could_complete_every_launch(lives: Lives, layout: Layout) -> None:
    ranks = lives.of(layout)
    assert faults(launches_of(ranks)) == []
    for life in ranks:
        assert life.losses == pytest.approx(lives.of((1, {}))[0].losses, rel=LOSS_BOUND)
        phases = {launch.phase for launch in life.launches}
        assert phases >= {"step", "validation", "stop", "save"}


def test_nccl_could_complete_every_way_of_saving(lives: Lives) -> None:
    """In the background, polled, in the foreground, and failing on one rank."""
    ranks = lives.of(SAVED, record_saves)
    assert faults(launches_of(ranks)) == []
    once = lives.of(SAVED)[0].launches
    assert sum(launch.phase == "save" for launch in ranks[0].launches) > 4 * sum(
        launch.phase == "save" for launch in once
    )
    assert any(launch.phase == "poll" for launch in ranks[0].launches)


@pytest.mark.parametrize(
    "layout", [(2, {}), (2, {"cp": 2}), (2, {"pp": 2}), (4, {"tp": 2, "cp": 2})], ids=layout_id
)
def test_figures_cost_one_gather_a_report(pool: RankPool, tmp_path: Path, layout: Layout) -> None:
    """Of four steps the first and the last (a validation, a stop) are reported."""
    ranks, changes = layout
    config = configure(changes, tmp_path / "run")
    config = replace(config, logging=replace(config.logging, interval=100, sample_ids=False))
    of_tensor_ranks = ["allreduce SUM"] if "tp" in changes else []
    for life in pool.run(record_life, config, ranks=ranks, timeout=150):
        assert len(life.losses) == STOP_AT
        reports = [launch for launch in life.launches if launch.phase == "report"]
        assert [launch.operation for launch in reports] == 2 * [*of_tensor_ranks, "allgather"]
        assert {len(launch.ranks) for launch in reports if "gather" in launch.operation} == {ranks}
        assert sum(launch.phase == "stop" for launch in life.launches) == STOP_AT
        # a step itself launches Megatron's, the scan's and the layers' collectives alone
        places = {x.place.split(":")[0] for x in life.launches if x.phase in ("step", "backward")}
        assert places.isdisjoint({"figures.py", "step.py", "loop.py", "metrics.py"})


def test_what_should_be_launched_is_recorded(lives: Lives) -> None:
    """Nothing slips past the recorder: messages of pipeline and scan, gathers of attention."""
    found = {
        (launch.place.split(":")[0], launch.operation, launch.phase)
        for launch in lives.of(MIXED)[0].launches
    }
    for phase in ("step", "validation"):
        assert ("p2p_communication.py", "messages", phase) in found
        assert ("transport.py", "messages", phase) in found
        assert {("collectives.py", name, phase) for name in COLLECTIVES} & found
    assert ("transport.py", "messages", "backward") in found
    assert {("collectives.py", f"{name} SUM", "backward") for name in COLLECTIVES} & found
    # Every method of a process group is either recorded or known not to communicate.
    methods = {name for name in dir(ProcessGroup) if callable(getattr(ProcessGroup, name))}
    unknown = methods - COLLECTIVES - MESSAGES - REFUSED - SILENT
    assert {name for name in unknown if not name.startswith("__")} == set()


def test_swapped_launches_are_found(lives: Lives) -> None:
    """Two successive launches on a communicator, exchanged on one rank; some of all such pairs."""
    records = launches_of(lives.of(MIXED))
    tried = 0
    for rank, record in enumerate(records):
        last: dict[str, int] = {}
        for place, launch in enumerate(record):
            before = last.get(launch.communicator)
            last[launch.communicator] = place
            if before is None or place % 5 or _may_be_exchanged(record[before], launch):
                continue
            swapped = list(record)
            swapped[before], swapped[place] = launch, record[before]
            mutant = [*records[:rank], swapped, *records[rank + 1 :]]
            assert faults(mutant), f"rank {rank}: {record[before]} and {launch} exchanged"
            tried += 1
    assert tried > 50


def _may_be_exchanged(one: Launch, other: Launch) -> bool:
    """Whether every peer meets the same messages either way, or the launches are equal."""

    def halves(launches: list[Launch]) -> dict[tuple[Any, int], list[Message]]:
        found: dict[tuple[Any, int], list[Message]] = {}
        for message in (message for launch in launches for message in launch.messages):
            found.setdefault((message.direction, message.peer), []).append(message)
        return found

    both = bool(one.messages and other.messages)
    return one == other or (both and halves([one, other]) == halves([other, one]))


@contextmanager
def another_order(trainer: Trainer) -> Iterator[None]:
    """After a step, two ranks of four (one of each tp group, one of each dp group) sum over dp and
    then tp, the others over tp and then dp. Gloo completes both, since neither is waited for
    before the other is launched; where one is, everybody waits for the next one in a circle.
    """
    groups, whole_step = [trainer.ranks.groups.tp, trainer.ranks.groups.dp], trainer.train_step
    if groups[0].rank() == groups[1].rank():
        groups.reverse()

    def train_step(data: Any, **options: Any) -> Any:
        outcome = whole_step(data, **options)
        flights = [dist.all_reduce(torch.ones(3), group=group, async_op=True) for group in groups]
        for flight in flights:
            flight.wait()
        return outcome

    with mock.patch.object(trainer, "train_step", train_step):
        yield


def test_ranks_that_launch_in_another_order_are_found(pool: RankPool, tmp_path: Path) -> None:
    """Each communicator's own order is right; together they stop a device with one queue."""
    config = configure({"tp": 2}, tmp_path / "run")
    records = launches_of(pool.run(record_life, config, another_order, ranks=4, timeout=150))
    assert differences(records) == []
    assert any("allreduce SUM [3 float32]" in line for line in deadlock(records))


@contextmanager
def crossed_messages(trainer: Trainer) -> Iterator[None]:
    """After a step, rank 1 receives two messages in another order than rank 0 sends them in; gloo
    tells them apart by their tags, NCCL knows none.
    """
    group, whole_step = trainer.ranks.groups.tp, trainer.train_step

    def train_step(data: Any, **options: Any) -> Any:
        outcome = whole_step(data, **options)
        post, order = (dist.isend, (1, 2)) if group.rank() == 0 else (dist.irecv, (2, 1))
        for work in [post(torch.ones(tag), 1 - group.rank(), group, tag) for tag in order]:
            work.wait()
        return outcome

    with mock.patch.object(trainer, "train_step", train_step):
        yield


def test_messages_that_cross_are_found(pool: RankPool, tmp_path: Path) -> None:
    config = configure({"tp": 2}, tmp_path / "run")
    records = launches_of(pool.run(record_life, config, crossed_messages, ranks=2, timeout=150))
    (found,) = differences(records)
    assert "from rank 0 to rank 1 over TENSOR_MODEL_PARALLEL_GROUP" in found
