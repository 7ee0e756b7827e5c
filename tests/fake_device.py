"""A device that is not there: what the tests of device mistakes share.

Two kinds of tensors without values find what only a GPU would have shown:

- *fake* tensors (``FakeTensorMode``) say "cuda" and refuse to meet a CPU tensor, to be read by the
  host, or to decide a shape; forward and validation run on them;
- *meta* tensors also run backward, under a counter (``megatron_ttt/benchmarks/device_counter.py``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_group(*, ranks: int) -> Iterator[Any]:
    """Rank 0 of a group whose messages arrive at once and hold nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
