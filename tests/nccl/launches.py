"""Records every collective and every message that a rank launches; the real call still runs.

    with recording() as record:
        train()
    record.launches        # in the order in which this process launched them

The methods of ``ProcessGroup`` are wrapped rather than the functions of ``torch.distributed``:
libraries keep those under names of their own, but all of them end at the methods.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import typing_extensions
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_ttt.parallel import cpu

# Of a gather only the inputs, of a scatter only the outputs are equal on all ranks.
TENSORS_OF = {"gather": slice(1, 2), "scatter": slice(0, 1)}
COLLECTIVES = {
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "gather", "scatter"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
}
MESSAGES = {"send", "recv"}
REFUSED = {"recv_anysource"}  # NCCL has none
SILENT = {  # of the rest of a process group's methods, which launch nothing
    *("BackendType", "abort", "boxed", "unbox", "get_group_store", "merge_remote_group", "name"),
    *("rank", "set_timeout", "shutdown", "size", "split_group"),
    *("use_pg_for_symm_mem_rendezvous", "_enable_collectives_timing", "_end_coalescing"),
    *("_get_backend", "_get_sequence_number_for_group", "_has_hooks", "_id", "_register_backend"),
    *("_register_on_completion_hook", "_set_default_backend", "_set_group_desc"),
    *("_set_group_name", "_set_sequence_number_for_group", "_start_coalescing"),
    *("_wait_for_pending_works", "_get_backend_name", "_backend_id", "_pybind11_conduit_v1_"),
}


class Direction(Enum):
    SEND = "send to"
    RECEIVE = "receive from"


@dataclass(frozen=True)
class Message:
    """One half of a point-to-point message; ``peer`` is a global rank."""

    direction: Direction
    peer: int
    elements: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.direction.value} {self.peer} {self.elements} {self.dtype}"


@dataclass(frozen=True)
class Launch:
    """One collective, or one batch of messages, as one rank launched it.

    Attributes:
        communicator: the process group's name, equal on all its ranks, and description.
        ranks: its global ranks.
        operation: with its reduction and root; ``messages`` for a batch.
        tensors: (elements, dtype) of a collective's tensors.
        messages: of a batch.
        phase, place: what the rank was doing, and where in the code: for people alone.
    """

    communicator: str
    ranks: tuple[int, ...]
    operation: str
    tensors: tuple[tuple[int, str], ...] = ()
    messages: tuple[Message, ...] = ()
    phase: str = field(default="", compare=False)
    place: str = field(default="", compare=False)

    def __str__(self) -> str:
        what = "; ".join(map(str, self.messages)) or ", ".join(f"{n} {d}" for n, d in self.tensors)
        where = f" ({self.phase}, {self.place})" if self.place else ""
        return f"{self.operation} [{what}] over {self.communicator} {list(self.ranks)}{where}"


class LaunchRecord:
    """What one rank launched, in order. Groups of one rank launch nothing."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.phase = ""
        self._lock = threading.Lock()
        self._batch = threading.local()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what is going on."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def during_calls(self, owner: Any, name: str, phase: str) -> Any:
        """A patch of ``owner.name``: what it launches belongs to ``phase``."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return original(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Messages launched inside are one launch."""
        self._batch.messages = []
        try:
            yield
            messages, group = self._batch.messages, getattr(self._batch, "group", None)
            if messages:
                self._add(group, "messages", (), tuple(messages))
        finally:
            self._batch.messages = None

    def collective(self, group: ProcessGroup, name: str, args: Any, kwargs: Any) -> None:
        """Note a collective from the arguments of its method."""
        operation = name
        for options in (*args, *kwargs.values()):
            reduction, root = (getattr(options, key, None) for key in ("reduceOp", "rootRank"))
            if reduction is not None:
                operation += f" {_reduction(reduction)}"
            if root is not None:
                operation += f" root {root}"
        tensors = _tensors(args[TENSORS_OF.get(name, slice(None))])
        self._add(group, operation, tuple((t.numel(), _dtype(t)) for t in tensors), ())

    def message(self, group: ProcessGroup, name: str, tensors: Any, peer: int) -> None:
        """Note a message; inside :meth:`batch` it joins the batch."""
        direction = Direction.SEND if name == "send" else Direction.RECEIVE
        peer = dist.get_process_group_ranks(group)[peer]
        messages = [Message(direction, peer, t.numel(), _dtype(t)) for t in tensors]
        if getattr(self._batch, "messages", None) is None:
            self._add(group, "messages", (), tuple(messages))
        else:
            self._batch.messages += messages
            self._batch.group = group

    def _add(
        self,
        group: Any,
        operation: str,
        tensors: tuple[tuple[int, str], ...],
        messages: tuple[Message, ...],
    ) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return
        name = f"{group.group_desc} {group.group_name}"
        # Autograd's task is known inside a backward, where recomputation runs as well.
        in_backward = torch._C._current_graph_task_id() != -1
        phase = "backward" if in_backward else self.phase
        launch = Launch(name, ranks, operation, tensors, messages, phase, _place())
        with self._lock:
            self.launches.append(launch)


@contextmanager
def recording() -> Iterator[LaunchRecord]:
    """Record what this process launches, in all its threads, while the context is open."""
    record = LaunchRecord()
    batched = dist.batch_isend_irecv

    def batch_isend_irecv(operations: Any) -> Any:
        with record.batch():
            return batched(operations)

    with ExitStack() as stack:
        for name in (COLLECTIVES | MESSAGES | REFUSED) & set(dir(ProcessGroup)):
            stack.enter_context(mock.patch.object(ProcessGroup, name, _recorded(record, name)))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", batch_isend_irecv))
        yield record


def _recorded(record: LaunchRecord, name: str) -> Callable[..., Any]:
    original = getattr(ProcessGroup, name)

    def launch(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        assert name not in REFUSED, f"{name}: NCCL cannot do it"
        if name in MESSAGES:
            record.message(group, name, args[0], args[1])
        else:
            record.collective(group, name, args, kwargs)
        return original(group, *args, **kwargs)

    return launch


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _reduction(reduction: Any) -> str:
    kinds = ReduceOp.RedOpType.__members__.values()
    return next(kind.name for kind in kinds if reduction == kind)


def _place() -> str:
    """File and line of the innermost caller outside torch and what wraps its functions."""
    torch_folder = os.path.dirname(torch.__file__)
    wrappers = {
        __file__,
        mock.__file__,
        cpu.__file__,
        contextlib.__file__,
        typing_extensions.__file__,
    }
    frame: Any = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(torch_folder) and name not in wrappers:
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
