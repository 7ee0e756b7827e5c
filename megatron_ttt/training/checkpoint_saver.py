"""Gets a checkpoint to disk, in the step or behind its back, and says "saved" when it is.

One path serves both modes. Megatron plans who writes which tensor and hands back a request; every
rank writes its files, syncs them and records their checksums; when all ranks are done, rank 0
writes the index and publishes the folder. Synchronously a rank writes at once. Asynchronously it
writes in a forked process: on a GPU the tensors are copied to the host first, on CPU the fork
itself is the copy, so the step waits for the copy alone.

Megatron's own writing function starts further processes, and a server process that a SIGTERM to
the process group would kill in the middle of the save that follows it; ours starts none.
"""

import inspect
import pickle
import queue
import secrets
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ttt.checkpoints import run_files as files
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.config.schema import OptimizerForm
from megatron_ttt.files import sync_file
from megatron_ttt.training.checkpoint import TrainingState, content, layout, sharded_state
from megatron_ttt.training.distributed import Ranks
from megatron_ttt.training.optimizer_state import bucket_sizes, saves_by_bucket
from megatron_ttt.training.resilience import agree, on_first_rank, reason


class SaveMode(Enum):
    """Whether a step waits until its checkpoint is on disk, or only until it is copied."""

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"


class SaveFailed(Exception):
    """A checkpoint could not be saved; the ones before it are untouched. Raised on every rank."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last ``last`` and those at multiples of ``every`` steps.

    ``last=None`` keeps all.
    """

    last: int | None = None
    every: int | None = None


class CheckpointSaver:
    """Saves a run's checkpoints; every rank calls every method at the same point."""

    def __init__(
        self,
        root: Path,
        state: TrainingState,
        *,
        ranks: Ranks,
        mode: SaveMode,
        facts: dict[str, Any],
        retention: Retention,
        report: Callable[[str], None],
    ) -> None:
        """Save into a run's folder.

        Args:
            root: the run's ``checkpoints`` folder.
            facts: what manifests should hold besides the layout.
            report: told "saved ..." when a checkpoint is visible, not before.
        """
        self.root, self.state, self.ranks, self.mode = root, state, ranks, mode
        self._facts = {**facts, "layout": layout(ranks)}
        self._retention, self._report = retention, report
        self._calls = AsyncCallsQueue()
        self._pending: int | None = None  # step of the checkpoint under way
        self._folder: Path | None = None  # where it is being written
        self._form = OptimizerForm.fully_reshardable  # of that checkpoint

    def save(
        self, progress: Progress, form: OptimizerForm = OptimizerForm.fully_reshardable
    ) -> None:
        """Save now, or begin to; an earlier save still under way is completed first.

        Args:
            progress: of the run.
            form: of the optimizer's state. Where Megatron cannot save it by bucket it becomes
                ``fully_reshardable``, and that is reported.

        Raises:
            SaveFailed: this or the earlier one could not be saved.
        """
        self.finish()
        self._pending = progress.step
        self._form = self._possible(form)
        folder = self._guarded(partial(on_first_rank, self.ranks, partial(self._prepare, progress)))
        self._folder = folder
        request = self._guarded(partial(self._request, folder, progress))
        if self.mode is SaveMode.ASYNCHRONOUS:
            self._calls.schedule_async_request(request)
            return
        self._guarded(partial(self._write_now, request))
        self._pending = None

    def _possible(self, form: OptimizerForm) -> OptimizerForm:
        if form is OptimizerForm.fully_reshardable:
            return form
        cannot = not saves_by_bucket(self.state.optimizer)
        somewhere = torch.tensor(int(cannot), device=self.ranks.device)
        dist.all_reduce(somewhere, op=dist.ReduceOp.MAX)
        if not int(somewhere):
            return form
        full = OptimizerForm.fully_reshardable
        self._report(
            f"saving as {full.value}: Megatron cannot save these gradient buckets one by one"
        )
        return full

    def poll(self) -> None:
        """Publish the checkpoint under way if every rank has written its part; do not wait.

        Raises:
            SaveFailed: a rank could not write its part.
        """
        if self._pending is not None:
            self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait until no checkpoint is under way.

        Raises:
            SaveFailed: a rank could not write its part.
        """
        if self._pending is not None:
            self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._guarded(lambda: self._calls.maybe_finalize_async_calls(blocking=blocking)):
            self._pending = None

    def _prepare(self, progress: Progress) -> Path:
        """On rank 0: an empty folder that can be written to."""
        self.root.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.root)
        folder = files.partial_folder(self.root, progress.step, secrets.token_hex(4))
        folder.mkdir()
        probe = folder / "probe"
        probe.write_bytes(bytes(1 << 16))
        sync_file(probe)
        probe.unlink()
        return folder

    def _request(self, folder: Path, progress: Progress) -> AsyncRequest:
        """Megatron's plan, with our writing function, ending in the publication."""
        state = sharded_state(self.state, self.ranks, self._form)
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), self.ranks.groups.dp_cp
        )
        newer = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        with mock.patch.object(filesystem_async, "_results_queue", _Mailbox()):
            request = dist_checkpointing.save(
                state,
                str(folder),
                strategy,
                async_sharded_save=True,
                content_metadata=content(self._form),
                **({"async_strategy": "mcore"} if newer else {}),
            )
        assert request is not None
        self._check_space(folder, request)
        if request.async_fn is not None:
            transforms = request.async_fn.args[0]
            request = request._replace(async_fn=partial(_write, transforms, folder))
        request.add_finalize_fn(partial(self._publish, folder, progress))
        return request

    def _check_space(self, folder: Path, request: AsyncRequest) -> None:
        """Fail before anything is written rather than with a full disk."""
        buckets = request.async_fn_args[1] if request.async_fn is not None else []
        sizes = [tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors]
        needed = torch.tensor(sum(sizes), dtype=torch.int64, device=self.ranks.device)
        dist.all_reduce(needed)
        free = on_first_rank(self.ranks, lambda: shutil.disk_usage(folder).free)
        if int(needed) > free:
            raise SaveFailed(
                f"{folder.parent}: {int(needed) / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB free"
            )

    def _write_now(self, request: AsyncRequest) -> None:
        error = None
        try:
            if request.async_fn is not None:
                rank, _, results = request.async_fn_args
                request.async_fn(rank, request.preload_fn(), results)
        except (OSError, RuntimeError) as failure:
            error = failure
        complaint = agree(self.ranks, error)
        if complaint is not None:
            raise SaveFailed(complaint)
        for finalize in request.finalize_fns:
            finalize()

    def _publish(self, folder: Path, progress: Progress) -> None:
        said = {"form": self._form.value, "buckets": bucket_sizes(self.state.optimizer)}

        def publish() -> Path:
            facts = {**self._facts, "optimizer": said}
            final = files.publish(self.root, folder, progress, facts)
            keep = self._retention
            files.remove_surplus(self.root, keep_last=keep.last, keep_every=keep.every)
            return final

        self._report(f"saved {on_first_rank(self.ranks, publish)}")

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Turn whatever stops a save into one line, and free what it has taken of the disk."""
        try:
            return action()
        except CheckpointException as error:  # only rank 0 is told the reasons
            reasons = {reason(failure[0]) for failure in error.failures.values()}
            words = on_first_rank(self.ranks, lambda: "; ".join(sorted(reasons)))
            cause: BaseException = error
        except (SaveFailed, OSError) as error:
            words, cause = reason(error), error
        if self.ranks.is_first and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # else the next save's beginning does
        raise SaveFailed(
            f"checkpoint of step {self._pending} not saved: {words}; earlier ones are untouched"
        ) from cause


def _write(
    transforms: list[Any], folder: Path, rank: int, buckets: list[Any], results: "_Mailbox"
) -> None:
    """Write, sync and record this rank's files; the outcome, good or bad, goes to ``results``."""
    try:
        with ThreadPoolExecutor(len(buckets)) as pool:
            written = list(
                pool.map(partial(_write_bucket, transforms), range(len(buckets)), buckets)
            )
        files.record_files(folder, [name for _, name, _ in buckets], writer=rank)
        results.put(dict(enumerate(written)))
    except Exception as error:  # reported on every rank when the save is finalized
        results.put(RuntimeError(reason(error)))


def _write_bucket(transforms: list[Any], number: int, bucket: Any) -> list[Any]:
    """One file; Megatron's function reports through queues."""
    outcome: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, outcome, running, True
    )
    _, result = outcome.get_nowait()
    if isinstance(result, Exception):
        raise result
    return result


class _Mailbox:
    """Hands one value from a forked process, or the same one, to whoever finalizes the save.

    A nameless file rather than a queue: a queue needs a thread and a reader, or a server process.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the save

    def put(self, value: Any) -> None:
        """Leave the value."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Take the value.

        Raises:
            queue.Empty: the writer died before it left one.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # noqa: S301 - written by this process or its fork
        except EOFError as error:
            raise queue.Empty from error
