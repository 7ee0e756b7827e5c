"""Slow links for scans on machines whose ranks share memory."""

import time

from megatron_ttt.parallel.scan_algorithms.problem import Exchange
from megatron_ttt.parallel.transport import Transport


class DelayedTransport:
    """A transport with slow links: a received message costs ``alpha_s + beta_s_per_byte * bytes``.

    For tests and benchmarks of overlap on machines whose ranks share the cores: the added time
    sleeps, so it can be hidden as a network's can.
    """

    def __init__(self, inner: Transport, *, alpha_s: float, beta_s_per_byte: float) -> None:
        self._inner = inner
        self._alpha_s = alpha_s
        self._beta_s_per_byte = beta_s_per_byte

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def messages_sent(self) -> int:
        return self._inner.messages_sent

    def exchange(self, request: Exchange) -> None:
        self._inner.exchange(request)
        sizes = [message.tensor.nbytes for message in request.receives]
        time.sleep(sum(self._alpha_s + self._beta_s_per_byte * size for size in sizes))

    def finish(self) -> None:
        self._inner.finish()
