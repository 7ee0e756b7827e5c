"""Ends what would hang: NCCL's waits do not block the host, so nobody there notices a dead rank."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from megatron_ttt.parallel.transport import ScanError

logger = logging.getLogger(__name__)

POLL_S = 0.05


class Watchdog:
    """Watches queued scans; one that is not done ``timeout_s`` after it was queued is given up.

    Then ``abort`` is called once (it frees the kernels that wait for a peer, and with them a host
    that waits for the device), and :meth:`raise_failure` raises from then on.
    """

    def __init__(self, *, timeout_s: float, abort: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._abort = abort
        self._watched: deque[tuple[Callable[[], bool], float, str]] = deque()
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="scan watchdog", daemon=True)
        self._thread.start()

    def watch(self, done: Callable[[], bool], what: str) -> None:
        """``done`` becomes true when the scan has run; ``what`` names it."""
        self.raise_failure()
        with self._changed:
            self._watched.append((done, time.monotonic() + self._timeout_s, what))
            self._changed.notify()

    def raise_failure(self) -> None:
        """Raise :class:`ScanError` if a scan has been given up."""
        if self._failure is not None:
            raise ScanError(self._failure)

    def _run(self) -> None:
        while self._failure is None:
            with self._changed:
                self._changed.wait_for(lambda: self._watched)
                done, deadline, what = self._watched[0]
            if done():
                self._watched.popleft()
            elif time.monotonic() > deadline:
                self._failure = (
                    f"{what}: not finished {self._timeout_s:g} s after it was queued; "
                    "a rank of the group died or is late"
                )
                logger.critical(self._failure)
                self._abort()
            else:
                time.sleep(POLL_S)
