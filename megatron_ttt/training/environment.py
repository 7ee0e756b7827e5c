"""What a node must have, and what must be set, before torch sees its GPU. No torch here."""

import os
import shutil
import sysconfig
from pathlib import Path

from megatron_ttt.config.schema import ParallelConfig

LAUNCH_ORDER = "CUDA_DEVICE_MAX_CONNECTIONS"


def order_launches(parallel: ParallelConfig) -> None:
    """Let kernels start in the order of their launches where Megatron-core counts on it.

    With tensor parallelism its linear layers launch a collective, then the product that is to hide
    it. With one hardware queue the collective starts first; with several the product may take the
    whole device before it does. With context parallelism the queue would be shared with the scan
    of the fast weights: its rounds wait for other ranks, and a product queued behind them waits
    too. There the queues stay apart. A value that is already set stays as it is.
    """
    if parallel.tp > 1 and parallel.cp == 1:
        os.environ.setdefault(LAUNCH_ORDER, "1")


def missing_for_compilation() -> str | None:
    """Return what this node lacks for ``torch.compile``, which Megatron-core uses.

    Its kernels' launchers are compiled on each node when they are first needed: with a C compiler
    against Python's headers. ``None`` where both are there.
    """
    compilers = [os.environ.get("CC"), "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in compilers if name):
        return "has no C compiler (gcc, clang or $CC), which torch.compile needs on every GPU node"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        return (
            f"has no {headers} (package python3-dev or python3-devel),"
            " which torch.compile needs on every GPU node"
        )
    return None
