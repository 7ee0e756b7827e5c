"""The four ways to run the scan, each a generator of :class:`~.problem.Exchange` requests.

The same code runs on real ranks (``transport.py``) and on thousands of simulated ones
(``tests/simulator.py``): an algorithm only says what it sends, what it expects, and how it
combines.
"""

from collections.abc import Callable

from megatron_ttt.parallel.scan_algorithms.all_gather import all_gather
from megatron_ttt.parallel.scan_algorithms.all_to_all import all_to_all
from megatron_ttt.parallel.scan_algorithms.doubling import doubling
from megatron_ttt.parallel.scan_algorithms.problem import Carries, Program, ScanProblem, Summaries
from megatron_ttt.parallel.scan_algorithms.ring import ring
from megatron_ttt.scan_words import ScanAlgorithm

PROGRAMS: dict[ScanAlgorithm, Callable[[ScanProblem, Summaries, Carries], Program]] = {
    ScanAlgorithm.all_gather: all_gather,
    ScanAlgorithm.all_to_all: all_to_all,
    ScanAlgorithm.doubling: doubling,
    ScanAlgorithm.ring: ring,
}

ALGORITHMS = tuple(PROGRAMS)
