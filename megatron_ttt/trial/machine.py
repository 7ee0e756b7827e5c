"""What the machine is, what it reaches on plain work, and its own tests."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ttt.config.devices import device_named
from megatron_ttt.trial.stage import Call, Cell, Skipped, measured

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "apex", "transformers")
_ROOT = Path(__file__).resolve().parents[2]


def peak_tflops(name: str) -> float | None:
    """Return a device's peak by the driver's name for it; ``None`` for one that is not known."""
    device = device_named(name)
    return None if device is None else device.value.peak_tflops


def versions(call: Call) -> Iterator[Cell]:
    """Versions, the devices, and the rates of one large product and one large copy."""
    yield Cell("python", platform.python_version())
    for package in _PACKAGES:
        yield Cell(package, _version(package))
    if call.device.type == "cuda":
        yield Cell("CUDA, NCCL", f"{torch.version.cuda}, {torch.cuda.nccl.version()}")
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            peak = peak_tflops(found.name)
            words = (
                f"{found.name}, {found.total_memory / 2**30:.1f} GiB, sm_{found.major}{found.minor}"
            )
            yield Cell(
                f"device {number}",
                f"{words}, peak {'unknown' if peak is None else f'{peak:g} TFLOP/s'}",
                {"name": found.name, "bytes": found.total_memory, "peak_tflops": peak},
            )
    else:
        yield Cell("device", f"CPU, {torch.get_num_threads()} threads")
    yield measured("a large product", lambda: _product(call))
    yield measured("a large copy", lambda: _copy(call))


def device_tests(call: Call) -> Iterator[Cell]:
    """``tests/gpu`` by pytest, in a process of its own."""
    folder = _ROOT / "tests" / "gpu"
    if not folder.is_dir():
        raise Skipped(f"{folder} is not there: the trial was not started from a checkout")
    report = call.folder / "tests_gpu.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(folder)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    (call.folder / "tests_gpu.log").write_text(done.stdout + done.stderr)
    summary = [line for line in done.stdout.splitlines() if " in " in line][-1:]
    words = summary[0].strip("= ") if summary else "pytest printed no summary"
    yield Cell("tests/gpu", words, {"exit_status": done.returncode})
    if done.returncode:
        raise RuntimeError(
            f"tests/gpu: exit status {done.returncode}; {report.with_suffix('.log')}"
        )


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 5) -> list[float]:
    """Return the seconds of every round after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _product(call: Call) -> tuple[str, dict[str, Any]]:
    size, dtype = (8192, torch.bfloat16) if call.is_full else (256, torch.float32)
    matrix = torch.randn(size, size, device=call.device).to(dtype)
    seconds = statistics.median(seconds_of(lambda: matrix @ matrix, call.device))
    rate = 2 * size**3 / seconds
    words = f"{rate / 1e12:.3g} TFLOP/s ({size} x {size}, {str(dtype).removeprefix('torch.')})"
    return words, {"flop_per_second": rate, "seconds": seconds}


def _copy(call: Call) -> tuple[str, dict[str, Any]]:
    count = 2**29 if call.is_full else 2**16
    source = torch.zeros(count, device=call.device)
    target = torch.empty_like(source)
    seconds = statistics.median(seconds_of(lambda: target.copy_(source), call.device))
    rate = 2 * 4 * count / seconds
    return f"{rate / 1e9:.4g} GB/s read and written", {"bytes_per_second": rate}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
