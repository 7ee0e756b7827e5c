"""The four ways to run the scan, each a generator of :class:`~.problem.Exchange` requests.

The same code runs on real ranks (``transport.py``) and on thousands of simulated ones
(``tests/simulator.py``): an algorithm only says what it sends, what it expects, and how it
combines.
"""

from collections.abc import Callable
from enum import Enum

from megatron_ttt.parallel.scan_algorithms.all_gather import all_gather
from megatron_ttt.parallel.scan_algorithms.all_to_all import all_to_all
from megatron_ttt.parallel.scan_algorithms.doubling import doubling
from megatron_ttt.parallel.scan_algorithms.problem import Carries, Program, ScanProblem, Summaries
from megatron_ttt.parallel.scan_algorithms.ring import ring


class Algorithm(Enum):
    """The values are those of the configuration's ``parallel.scan``."""

    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    DOUBLING = "doubling"
    RING = "ring"


PROGRAMS: dict[Algorithm, Callable[[ScanProblem, Summaries, Carries], Program]] = {
    Algorithm.ALL_GATHER: all_gather,
    Algorithm.ALL_TO_ALL: all_to_all,
    Algorithm.DOUBLING: doubling,
    Algorithm.RING: ring,
}
