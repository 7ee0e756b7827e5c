"""One layer at a time: fast weights, attention's kernels, decoding, the scan."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.benchmarks import decoding
from megatron_ttt.benchmarks import fast_weight_layer as layer
from megatron_ttt.benchmarks.layer_report import as_record
from megatron_ttt.model.attention import attend, kernel_for
from megatron_ttt.model.attention_plan import plan_attention
from megatron_ttt.model.varlen_attention import pack
from megatron_ttt.trial.stage import Call, Cell, Skipped, measured

# hidden, ffn
SHAPES = {"qwen3_4b": (2560, 9728), "qwen3_8b": (4096, 12288)}
CHUNKS = (64, 256, 512, 1024, 4096)
_TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


def fast_weight_layers(call: Call) -> Iterator[Cell]:
    """Ours against the materialising formulation and a dense projection, with floors.

    Where the materialising one does not fit, ours is measured against the dense one alone.
    """
    shapes = SHAPES if call.is_full else {"toy": (16, 32)}
    lengths = (16384, 65536) if call.is_full else (64,)
    chunks = CHUNKS if call.is_full else (8, 32)
    for name, (hidden, ffn) in shapes.items():
        for tokens in lengths:
            for chunk in chunks:
                problem = layer.LayerProblem(
                    hidden=hidden,
                    ffn=ffn,
                    tokens=tokens,
                    chunk=chunk,
                    dtype="bf16" if call.is_full else "fp32",
                    device=call.device.type,
                    repeats=5 if call.is_full else 2,
                )
                case = f"{name}, {tokens} tokens, chunks of {chunk}"
                cell = measured(case, partial(_layer, problem, layer.VARIANTS))
                if cell.figure == "out of memory":
                    others = tuple(v for v in layer.VARIANTS if v.name != layer.MATERIALISING)
                    cell = measured(case, partial(_layer, problem, others))
                yield cell


def _layer(
    problem: layer.LayerProblem, variants: tuple[layer.Variant, ...]
) -> tuple[str, dict[str, Any]]:
    found, difference = layer.measure(problem, variants)
    words = [
        f"{one.name} {one.best * 1e3:.1f} ms (floor {one.floor_seconds * 1e3:.1f},"
        f" {one.extra_bytes / 2**20:.0f} MiB extra)"
        for one in found
    ]
    if len(found) < len(layer.VARIANTS):
        words.append("materialising does not fit")
    return "; ".join(words), as_record(problem, found, difference)


def attention_kernels(call: Call) -> Iterator[Cell]:
    """Which kernels attention runs, by the profiler: plain, by documents, windowed."""
    tokens = 16384 if call.is_full else 64
    heads, groups, dim = (32, 8, 128) if call.is_full else (4, 2, 8)
    dtypes = [torch.bfloat16, torch.float32] if call.device.type == "cuda" else [torch.float32]
    documents = torch.zeros(1, tokens, dtype=torch.bool)
    documents[0, :: tokens // 8] = True
    cases = {"plain": (None, None), "documents": (documents, None), "window": (None, tokens // 4)}
    for dtype in dtypes:
        for name, (starts, window) in cases.items():
            q, k, v = (
                torch.randn(1, n, tokens, dim, device=call.device).to(dtype).requires_grad_()
                for n in (heads, groups, groups)
            )
            plan = plan_attention(starts, batch=1, ranges=[(0, tokens)])
            packed = pack(plan, call.device)

            attention = partial(
                attend, q, k, v, plan=plan, packed=packed, window=window, scale=dim**-0.5
            )
            case = f"{name}, {str(dtype).removeprefix('torch.')}, by {kernel_for(q).value}"
            yield measured(case, partial(_profiled, attention, call.device))


def _profiled(attention: Callable[[], Tensor], device: torch.device) -> tuple[str, dict[str, Any]]:
    def both_ways() -> None:
        attention().sum().backward()

    both_ways()
    seconds, names = _profile(both_ways, device)
    return f"{seconds * 1e3:.2f} ms in {', '.join(names[:4])}", {"kernels": names}


def _profile(run: Any, device: torch.device) -> tuple[float, list[str]]:
    """Return seconds of all kernels (operations on a CPU), and their names, longest first."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda e: getattr(e, name), reverse=True)
    spent = [event for event in events if getattr(event, name) > 0]
    total: float = sum(getattr(event, name) for event in spent) / 1e6
    return total, [event.key for event in spent[:12]]


def decoding_speed(call: Call) -> Iterator[Cell]:
    """Time a generated token with fast weights on and off."""
    sizes: dict[str, Any] = {"hidden": 2560, "ffn": 9728, "layers": 36, "chunk": 512}
    if not call.is_full:
        sizes = {"hidden": 128, "ffn": 64, "layers": 2, "chunk": 4}
    for batch in (1, 4, 16) if call.is_full else (1, 2):
        problem = decoding.DecodingProblem(
            **sizes,
            batches=(batch,),
            rounds=5 if call.is_full else 1,
            dtype="bf16" if call.is_full else "fp32",
            device=call.device.type,
        )

        def decode(problem: decoding.DecodingProblem = problem) -> tuple[str, dict[str, Any]]:
            (found,) = times = decoding.measure(problem)
            words = (
                f"{found.with_fast_weights:.2f} ms a step, off {found.without:.2f}:"
                f" {found.ratio:.3f} (floor of bytes {found.floor:.3f})"
            )
            return words, decoding.as_record(problem, times)

        yield measured(f"batch {batch}", decode)


def scan(call: Call) -> Iterator[Cell]:
    """Time the scan on all GPUs there are; on gloo processes where the device is a CPU."""
    ranks = torch.cuda.device_count() if call.device.type == "cuda" else 2
    if ranks < 2:
        raise Skipped("a scan needs two ranks, and there is one GPU")
    output = call.folder / "scan_figures.json"
    arguments = ["scan", f"output={output}", f"state_mb={200 if call.is_full else 0.01}"]
    program = [sys.executable]
    if call.device.type == "cuda":
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    else:
        arguments += [f"ranks={ranks}", "repeats=1"]
    done = subprocess.run(
        [*program, str(_TOOL), *arguments], capture_output=True, text=True, check=False
    )
    (call.folder / "scan.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(done.stderr or done.stdout)
    report = json.loads(output.read_text())["report"]
    for timing in report["timings"]:
        words = f"{timing['median_s'] * 1e3:.2f} ms (predicted {timing['predicted_s'] * 1e3:.2f})"
        yield Cell(f"{timing['algorithm']}, {ranks} ranks", words, timing)
    yield Cell("auto takes", report["chosen"])
