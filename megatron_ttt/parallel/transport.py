"""Carries one scan's messages between the ranks of a process group, and counts them.

On the CPU (gloo) every wait has a deadline, so a peer that died or is late becomes an error that
names it. On CUDA (NCCL) waits only order streams and never block the host: ``watchdog.py`` looks
after those. Messages are point to point with a tag of their own, so a scan in the background
cannot be confused with the main thread's collectives on the same group.
"""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.parallel.scan_algorithms.problem import Exchange, Message


class ScanError(RuntimeError):
    """A scan that cannot finish: a rank of the group died, or is later than the timeout."""


class Transport(Protocol):
    """What runs an :class:`Exchange`. ``bytes_sent`` and ``messages_sent`` count the payload."""

    @property
    def bytes_sent(self) -> int: ...

    @property
    def messages_sent(self) -> int: ...

    def exchange(self, request: Exchange) -> None:
        """Post all messages; return when the received ones may be read (on CUDA: by this stream).

        Raises :class:`ScanError` when a peer does not answer in time.
        """
        ...

    def finish(self) -> None:
        """Wait until sent tensors may be overwritten."""
        ...


class GroupTransport:
    """Messages over ``group``; ``tag`` tells apart scans that are under way at the same time.

    ``what`` (group, layer, algorithm) begins every error's sentence.
    """

    def __init__(self, group: Any, *, tag: int, timeout_s: float, what: str) -> None:
        self._bytes_sent = 0
        self._messages_sent = 0
        self._group = group
        self._global_ranks = dist.get_process_group_ranks(group)
        self._tag = tag
        self._timeout_s = timeout_s
        self._what = what
        self._sending: list[tuple[Message, Any]] = []

    @property
    def bytes_sent(self) -> int:
        return self._bytes_sent

    @property
    def messages_sent(self) -> int:
        return self._messages_sent

    def exchange(self, request: Exchange) -> None:
        for message in request.sends:
            self._bytes_sent += message.tensor.nbytes
            self._messages_sent += 1
        messages = (*request.receives, *request.sends)
        if messages and messages[0].tensor.is_cuda:
            self._exchange_on_stream(request)
            return
        receiving = [(m, self._post(dist.irecv, m)) for m in request.receives]
        self._sending += [(m, self._post(dist.isend, m)) for m in request.sends]
        self._await(receiving, "a message from")

    def finish(self) -> None:
        self._await(self._sending, "a message to")
        self._sending = []

    def _exchange_on_stream(self, request: Exchange) -> None:
        # NCCL runs messages of a pair in order: grouped by round they cannot wait for each other.
        operations = [self._operation(dist.irecv, m) for m in request.receives]
        operations += [self._operation(dist.isend, m) for m in request.sends]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _operation(self, operation: Any, message: Message) -> dist.P2POp:
        peer = self._global_ranks[message.peer]
        return dist.P2POp(operation, message.tensor, peer, group=self._group, tag=self._tag)

    def _post(self, operation: Any, message: Message) -> Any:
        try:
            peer = self._global_ranks[message.peer]
            return operation(message.tensor, peer, group=self._group, tag=self._tag)
        except RuntimeError as error:
            raise self._failure(message.peer, "a message with", 0.0, error) from error

    def _await(self, posted: Iterable[tuple[Message, Any]], what: str) -> None:
        for message, work in posted:
            began = time.monotonic()
            try:
                work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as error:
                waited = time.monotonic() - began
                raise self._failure(message.peer, what, waited, error) from error

    def _failure(self, peer: int, what: str, waited: float, error: RuntimeError) -> ScanError:
        cause = str(error).splitlines()[0]
        return ScanError(
            f"{self._what}: {what} rank {peer} (global rank {self._global_ranks[peer]}) failed "
            f"after {waited:.2f} s of {self._timeout_s:g} s; it died, is late, or stopped: {cause}"
        )


def gather_values(transport: Transport, values: Tensor, *, rank: int, ranks: int) -> list[Tensor]:
    """Every rank's ``values`` (small, on the CPU, of one size) in rank order, point to point."""
    gathered = [torch.empty_like(values) for _ in range(ranks)]
    gathered[rank] = values
    others = [(rank + step) % ranks for step in range(1, ranks)]
    sends = [Message(peer, values) for peer in others]
    transport.exchange(Exchange(sends, [Message(peer, gathered[peer]) for peer in others]))
    transport.finish()
    return gathered
