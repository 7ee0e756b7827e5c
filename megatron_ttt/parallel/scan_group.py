"""The lasting part of the scans of one process group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.parallel.cost import Topology
from megatron_ttt.parallel.transport import GroupTransport, Transport, gather_values
from megatron_ttt.parallel.watchdog import Watchdog
from megatron_ttt.scan_words import ScanAlgorithm

TAGS = 1 << 16
SCAN_TAGS = 1 * TAGS  # above the small tags that others use
GATHER_TAGS = 2 * TAGS  # a rank that checks is not answered by one that scans
DESCRIPTION_BYTES = 256


class ScanGroup:
    """A process group with what its scans share: tags, checked shapes, stream, watchdog.

    Make one per context-parallel group and pass it as ``group`` wherever a scan asks for one.

    Args:
        group: the process group; None: a single rank.
        name: for errors.
        timeout_s: a scan fails when a peer is later than this.
        topology: constants for ``auto``; None: typical ones of the device. Equal on all ranks.
        wrap_transport: puts something between the scans and the network (a delay, a counter).
    """

    def __init__(
        self,
        group: Any,
        *,
        name: str = "context-parallel",
        timeout_s: float = 1800.0,
        topology: Topology | None = None,
        wrap_transport: Callable[[Transport], Transport] | None = None,
    ) -> None:
        self.group = group
        self.name = name
        self.timeout_s = timeout_s
        self.topology = topology
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"this process is not a rank of the {name} group")
        self._wrap_transport = wrap_transport
        self._scans = 0
        self._gathers = 0
        self._checked: set[str] = set()
        self._stream: torch.cuda.Stream | None = None
        self._watchdog: Watchdog | None = None

    @classmethod
    def of(cls, group: Any) -> "ScanGroup":
        """``group`` itself, or a new one around a bare process group or None."""
        return group if isinstance(group, cls) else cls(group)

    def describe(self, algorithm: ScanAlgorithm | None, label: str) -> str:
        """Names a scan in errors: group, layer, algorithm, this rank."""
        scan = "scan" if algorithm is None else f"scan {algorithm.value}"
        layer = f" of {label}" if label else ""
        return f"{scan}{layer} over the {self.name} group, rank {self.rank} of {self.ranks}"

    def transport(self, what: str) -> Transport:
        """Return a transport for the next scan, with a tag of its own among those under way."""
        transport: Transport = self._tagged(SCAN_TAGS + self._scans % TAGS, what)
        self._scans += 1
        return transport if self._wrap_transport is None else self._wrap_transport(transport)

    def _tagged(self, tag: int, what: str) -> GroupTransport:
        return GroupTransport(self.group, tag=tag, timeout_s=self.timeout_s, what=what)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream on which this group's scans run, one after the other."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def watchdog(self) -> Watchdog:
        if self._watchdog is None:
            self._watchdog = Watchdog(timeout_s=self.timeout_s, abort=self.group.abort)
        return self._watchdog

    def gather(self, values: Tensor, *, device: torch.device, what: str) -> list[Tensor]:
        """Every rank's ``values`` (small, of equal shape) in rank order, on their own device.

        ``device``: of the group's messages; values on the CPU travel through it.
        """
        if self.ranks == 1:
            return [values]
        if device.type == "cuda":
            gathered = torch.empty(self.ranks, *values.shape, dtype=values.dtype, device=device)
            dist.all_gather_into_tensor(gathered, values.to(device)[None], group=self.group)
            return list(gathered.to(values.device))
        transport = self._tagged(GATHER_TAGS + self._gathers % TAGS, what)
        self._gathers += 1
        return gather_values(transport, values, rank=self.rank, ranks=self.ranks)

    def check_equal(self, description: str, *, device: torch.device, what: str) -> None:
        """Raise ``ValueError`` on all ranks, saying who has what, unless descriptions are equal.

        A description is compared when it first occurs and costs nothing afterwards.
        """
        if description in self._checked:
            return
        encoded = description.encode()[:DESCRIPTION_BYTES].ljust(DESCRIPTION_BYTES, b"\0")
        values = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(self.gather(values, device=device, what=what)):
            text = bytes(theirs.tolist()).rstrip(b"\0").decode()
            holders.setdefault(text, []).append(rank)
        if len(holders) > 1:
            told = "; ".join(f"ranks {ranks}: {text}" for text, ranks in holders.items())
            raise ValueError(f"{what}: the ranks differ: {told}")
        self._checked.add(description)
