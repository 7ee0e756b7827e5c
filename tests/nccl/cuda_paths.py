"""Runs what only runs with CUDA and NCCL, on CPU and gloo: in the order that NCCL would see.

On CPU a thread drives a scan and its messages carry tags; on CUDA the main thread queues it on a
stream, in batches without tags, between the other launches on the communicator. Inside
:func:`cuda_paths` the second path is taken. Streams have the meaning of the CPU's one order of work
and a message is waited for by the host, so a run that ends has shown more than a stream asks for.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_ttt.parallel import scan
from megatron_ttt.parallel.cpu import CPU, CudaNames, megatron_on_cpu
from megatron_ttt.parallel.pending import StreamScan
from megatron_ttt.parallel.scan_algorithms.problem import Exchange
from megatron_ttt.parallel.scan_group import ScanGroup
from megatron_ttt.parallel.transport import GroupTransport
from megatron_ttt.parallel.watchdog import Watchdog


class Event:
    """Of a device whose work is done when it is queued."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing

    def record(self, stream: Any = None) -> None:
        """Done already."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Done already."""

    def elapsed_time(self, end: "Event") -> float:
        assert self._timed and end._timed, "these events keep no time"
        return 0.0


def _exchange(self: GroupTransport, request: Exchange) -> None:
    self._bytes_sent += sum(message.tensor.nbytes for message in request.sends)
    self._messages_sent += len(request.sends)
    if request.sends or request.receives:
        self._exchange_on_stream(request)


def _gather(self: ScanGroup, values: Tensor, *, device: torch.device, what: str) -> list[Tensor]:
    with CudaNames(CPU):  # again: it does not reach into a backward
        return gather_on_any_device(self, values, device=torch.device("cuda"), what=what)


gather_on_any_device = ScanGroup.gather


@contextmanager
def cuda_paths() -> Iterator[None]:
    """Megatron on CPU, with the scan's paths for CUDA."""
    watchdog = Watchdog(timeout_s=60.0, abort=_give_up)

    def streamed(*args: Any, timeout_s: float, **kwargs: Any) -> StreamScan:
        stream: Any = torch.cuda.current_stream()
        return StreamScan(*args, **kwargs, stream=stream, watchdog=watchdog)

    with ExitStack() as stack:
        stack.enter_context(megatron_on_cpu())
        for owner, name, replacement in (
            (scan, "ThreadedScan", streamed),
            (GroupTransport, "exchange", _exchange),
            (ScanGroup, "gather", _gather),
            (torch.cuda, "Event", Event),
            (torch.cuda, "stream", nullcontext),
            (Tensor, "record_stream", _stays),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _give_up() -> None:
    raise AssertionError("the watchdog gave a finished scan up")


def _stays(tensor: Tensor, stream: Any) -> None:
    """Memory of the CPU is not reused behind the program's back."""
