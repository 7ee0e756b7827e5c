"""From ``parallel.*`` to the scan that carries states between the ranks of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_ttt.config.derived import scan_timeout_s
from megatron_ttt.config.schema import CommPrecision, ParallelConfig
from megatron_ttt.model.sequence_layout import ScanSettings
from megatron_ttt.parallel.cost import load_topology
from megatron_ttt.parallel.scan_group import ScanGroup


def scan_settings(parallel: ParallelConfig, scan_group: Any) -> ScanSettings:
    """How states travel over a row's ranks, in training, evaluation and reading.

    Made once for a run or a session: the group remembers what its ranks have agreed on.

    Args:
        parallel: of the run.
        scan_group: the ranks of a row; a communicator of its own, beside attention's.
    """
    constants = parallel.scan_constants
    topology = load_topology(Path(constants)) if constants is not None else None
    bf16 = parallel.scan_precision is CommPrecision.bf16
    return ScanSettings(
        group=ScanGroup(scan_group, timeout_s=scan_timeout_s(parallel), topology=topology),
        order=parallel.cp_order,
        algorithm=parallel.scan,
        message_dtype=torch.bfloat16 if bf16 else None,
    )
