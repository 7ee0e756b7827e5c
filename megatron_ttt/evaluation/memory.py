"""The most memory that a call holds, on CPU and CUDA alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``function`` holds at most beyond what was held before; its result included.

    On CPU torch's profiler counts allocations, so a call inside is not to be timed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        kept = function()
    results = profile.profiler.kineto_results if profile.profiler else None
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    del kept
    return max(accumulate((event.nbytes() for event in events), initial=0))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence what the profiler's library prints at its start and stop, below Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
