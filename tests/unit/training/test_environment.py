"""What is set and checked before torch sees a GPU; no GPU is needed to see it done."""

import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ttt.config.derived import scan_timeout_s
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.schema import Config, ParallelConfig
from megatron_ttt.training import distributed as entry
from megatron_ttt.training.environment import (
    LAUNCH_ORDER,
    missing_for_compilation,
    order_launches,
)


@pytest.mark.parametrize(
    ("parallel", "before", "after"),
    [
        (ParallelConfig(tp=2), None, "1"),
        (ParallelConfig(), None, None),
        (ParallelConfig(tp=2, cp=4), None, None),
        (ParallelConfig(tp=2), "8", "8"),
        (ParallelConfig(tp=2, cp=4), "1", "1"),
    ],
)
def test_launches_are_ordered_where_nothing_waits_for_the_scan(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, before: str | None, after: str | None
) -> None:
    monkeypatch.setenv(LAUNCH_ORDER, before or "")
    if before is None:
        monkeypatch.delenv(LAUNCH_ORDER)
    order_launches(parallel)
    assert os.environ.get(LAUNCH_ORDER) == after


def test_what_compiles_kernels_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "has no " + str(tmp_path / "Python.h") in (missing_for_compilation() or "")
    (tmp_path / "Python.h").touch()
    assert missing_for_compilation() is None
    compiler.unlink()
    assert "has no C compiler" in (missing_for_compilation() or "")


class _Reached(Exception):
    """The process group would be made now."""


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with GPUs as far as the entry point asks; what it hands to torch.distributed."""
    given: dict[str, Any] = {}

    def init(backend: str, **arguments: Any) -> None:
        given.update(arguments, backend=backend)
        raise _Reached

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    torchrun = {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 8, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    return given


def test_a_process_group_is_bound_to_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = pretend_gpu(monkeypatch)
    monkeypatch.setattr(entry, "missing_for_compilation", lambda: None)
    with pytest.raises(_Reached), entry.distributed(Config()):
        pass
    assert given["backend"] == "nccl" and given["device_id"] == torch.device("cuda", 3)


def test_a_gpu_node_without_a_compiler_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = pretend_gpu(monkeypatch)
    monkeypatch.setattr(entry, "missing_for_compilation", lambda: "has no C compiler")
    refused = pytest.raises(ConfigError, match=r"^node=.*: has no C compiler$")
    with refused, entry.distributed(Config()):
        pass
    assert not given, "nothing was started"


def test_the_scan_gives_up_before_the_process_group_does() -> None:
    for timeout_s in (1, 60, 1800):
        assert scan_timeout_s(ParallelConfig(timeout_s=timeout_s)) < timeout_s
