"""Signals and reasons: what counts as one request, and what a person is told."""

import errno
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from megatron_ttt.training import resilience
from megatron_ttt.training.resilience import ECHO_SECONDS, StopRequest, deterministic, reason


class Left(Exception):
    """The process would have ended."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that ``time.monotonic`` says; leaving raises."""
    now = [100.0]
    monkeypatch.setattr(resilience.time, "monotonic", lambda: now[0])

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(resilience.os, "_exit", leave)
    yield now


def test_echoes_of_one_request_do_not_end_the_process(clock: list[float]) -> None:
    request = StopRequest()
    for _ in range(3):
        request.hear(signal.SIGTERM, None)
        clock[0] += ECHO_SECONDS / 3
    # They were one request, heard when the first came: later on the next one counts as a second.
    clock[0] += ECHO_SECONDS
    with pytest.raises(Left):
        request.hear(signal.SIGTERM, None)


def test_a_second_request_ends_it_at_once(clock: list[float]) -> None:
    request = StopRequest()
    request.hear(signal.SIGTERM, None)
    clock[0] += ECHO_SECONDS + 0.1
    with pytest.raises(Left) as left:
        request.hear(signal.SIGTERM, None)
    assert left.value.args == (128 + signal.SIGTERM,)


def test_the_handler_is_there_for_the_run_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with resilience.listening() as request:
        assert signal.getsignal(signal.SIGTERM) == request.hear
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process otherwise
    assert signal.getsignal(signal.SIGTERM) == before


def test_deterministic_algorithms_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO"):
        monkeypatch.setenv(name, "unset")  # restored afterwards
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_reasons_are_the_systems_words() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/shard")
    assert reason(full) == "/data/shard: No space left on device"
    try:
        try:
            raise full
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    except RuntimeError as stumble:
        assert reason(stumble) == "/data/shard: No space left on device"
    assert reason(ValueError("two\nlines")) == "two lines"
    assert reason(ValueError()) == "ValueError"
