"""Processes that read data, when the run is asked to stop."""

import os
import signal
import threading


def leave_with_parent_alone(worker: int) -> None:
    """Start a data worker: from now on only its parent's SIGTERM ends it.

    A scheduler that preempts a run signals every process of it. The trainer then finishes its
    step, for which it needs its workers: one that died would end the run without a checkpoint.
    The number of the worker is what torch's DataLoader passes; nothing depends on it.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, args=(parent,), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
