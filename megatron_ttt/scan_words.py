"""How a row lies on context-parallel ranks, and how its states travel between them. No torch.

Member names are what a configuration says: OmegaConf reads enums by name.
"""

from enum import Enum


class SequenceOrder(Enum):
    """How the spans of a row are dealt to ranks; key ``parallel.cp_order``."""

    zigzag = "zigzag"
    contiguous = "contiguous"


class ScanAlgorithm(Enum):
    """Which program carries states across ranks; key ``parallel.scan``.

    ``auto``: the fastest by the cost model.
    """

    auto = "auto"
    all_gather = "all_gather"
    all_to_all = "all_to_all"
    doubling = "doubling"
    ring = "ring"
