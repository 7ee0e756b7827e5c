"""Whole models: a step's time with fast weights on and off, its gradients, its profile."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.benchmarks.step_ratio import random_trainer, rows_of
from megatron_ttt.config.flops import training_flops_per_token
from megatron_ttt.config.load import load_config
from megatron_ttt.config.schema import Config, TTTMode
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.fast_weights.labels import Label
from megatron_ttt.model.build import build_model
from megatron_ttt.model.initialize import Draw, Origin, initialize, pretraining_draw
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.rule import added_start
from megatron_ttt.training.distributed import distributed
from megatron_ttt.training.step import ForwardStep
from megatron_ttt.trial.machine import peak_tflops, seconds_of
from megatron_ttt.trial.stage import Call, Cell, measured

COMMON = ["run.dry_run=true", "checkpoint.interval=null", "train.global_batch_size=1"]
# A 4B model's optimizer state does not fit one GPU: twelve of its layers, two of them fast.
STEPS = {
    "qwen3_0_6b": [],
    "qwen3_1_7b": [],
    "qwen3_4b": ["model.layers=12"],
}
LENGTHS = (8192, 32768)
TOY = ["+model=tiny", "train.seq_length=64", "ttt.chunk_size=16", "train.micro_batch_size=1"]
# Of gradients to those of fp32 on a CPU, relative norm over all parameters.
BOUNDS = {"fp32": 1e-3, "bf16": 6e-2}


def steps(call: Call) -> Iterator[Cell]:
    """Time a training step with fast weights on and off: their ratio, MFU, memory."""
    for name, words in STEPS.items() if call.is_full else [("tiny", [])]:
        for length in LENGTHS if call.is_full else (64,):
            own = TOY
            if call.is_full:
                own = [f"+model={name}", f"train.seq_length={length}", "ttt.chunk_size=1024"]
                own += ["train.recompute=selective", "train.loss_tokens=4096"]
            own = [*COMMON, *own, *words]
            both = [load_config([*own, switch]) for switch in ("ttt=in_place", "ttt=off")]
            case = f"{name}{''.join(' ' + word for word in words)}, {length} tokens"
            yield measured(case, partial(_on_and_off, both, call))


def _on_and_off(configs: Sequence[Config], call: Call) -> tuple[str, dict[str, Any]]:
    values = [_step(config, call) for config in configs]
    on, off = (statistics.median(value["seconds"]) for value in values)
    words = [f"on {on * 1e3:.1f} ms, off {off * 1e3:.1f} ms: {on / off:.3f}"]
    if values[0]["mfu"] is not None:
        words.append(f"MFU {values[0]['mfu']:.1%} and {values[1]['mfu']:.1%}")
    if values[0]["peak_bytes"]:
        peaks = [f"{value['peak_bytes'] / 2**30:.1f}" for value in values]
        words.append(f"{peaks[0]} and {peaks[1]} GiB")
    return "; ".join(words), {"on": values[0], "off": values[1], "ratio": on / off}


def _step(config: Config, call: Call) -> dict[str, Any]:
    with distributed(config) as ranks:
        trainer = random_trainer(config, ranks)
        batch = rows_of(config)
        seconds = seconds_of(
            lambda: trainer.train_step(repeat(batch), wants_norms=False), ranks.device
        )
        on_gpu = call.device.type == "cuda"
        peak = peak_tflops(torch.cuda.get_device_name()) if on_gpu else None
        flops = training_flops_per_token(config) * config.train.seq_length
        return {
            "seconds": seconds,
            "flops": flops,
            "mfu": flops / statistics.median(seconds) / (peak * 1e12) if peak else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        }


def gradients(call: Call) -> Iterator[Cell]:
    """Compare loss and every gradient of a 0.6B-shaped model with fp32 on a CPU."""
    words = ["+model=qwen3_0_6b", "train.seq_length=1024", "ttt.chunk_size=256", "ttt.eta=0.05"]
    words = [*COMMON, *(words if call.is_full else TOY)]
    on_gpu = call.device.type == "cuda"
    expected = _elsewhere(words, call.folder) if on_gpu else loss_and_gradients(words, "fp32")
    for precision in ("fp32", "bf16") if on_gpu else ("fp32",):
        found = loss_and_gradients(words, precision)
        difference = _difference(found, expected)
        moved = abs(found["loss"] - found["loss_off"])
        yield Cell(
            f"{precision} on {call.device.type}",
            f"loss {found['loss']:.6f}, CPU {expected['loss']:.6f}; gradients differ by"
            f" {difference:.1e} (bound {BOUNDS[precision]:.0e}); fast weights move the loss by"
            f" {moved:.1e}",
            {"difference": difference, "loss": found["loss"], "cpu_loss": expected["loss"]},
        )
        if not (difference < BOUNDS[precision] and moved > 0):
            raise RuntimeError(f"{precision}: gradients differ by {difference:.1e} from a CPU's")


def loss_and_gradients(words: Sequence[str], precision: str) -> dict[str, Any]:
    """Return loss, loss without fast weights, and gradients on the CPU in fp32."""
    config = load_config([*words, f"train.precision={precision}"])
    with ExitStack() as stack:
        ranks = stack.enter_context(distributed(config))
        on_gpu = ranks.device.type == "cuda"
        transformer = transformer_config(config, device_is_cuda=on_gpu)
        transformer.gradient_accumulation_fusion = False  # there is no buffer to add to
        model = build_model(config, transformer, ranks.groups, Origin.LOADED)
        initialize(
            model,
            seed=config.train.seed,
            vocab_size=config.model.vocab_size,
            tp_rank=0,
            tp_size=1,
            draw=_live_draw(config),
        )
        model = model.to(ranks.device)
        scan = scan_settings(config.parallel, ranks.scan_group)
        losses, batch = {}, rows_of(config, documents=3)
        for mode in (TTTMode.off, TTTMode.in_place):
            step = ForwardStep(config, ranks, scan=scan, mode=mode)
            output, loss_of = step(iter([batch]), model)
            total, tokens, _ = loss_of(output)
            losses[mode] = float(total.detach()) / float(tokens)
        (total / tokens).backward()
        return {
            "loss": losses[TTTMode.in_place],
            "loss_off": losses[TTTMode.off],
            "gradients": {
                name: parameter.grad.float().cpu()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            },
        }


def _live_draw(config: Config) -> Draw:
    """Return a start whose target generator writes something: published ones begin at zero."""
    usual = pretraining_draw(config.model)

    def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if added_start(name) is not None:
            return torch.randn(shape, generator=generator) / shape[0] ** 0.5
        return usual(name, shape, generator)

    return draw


def _elsewhere(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run on the CPU in a process that sees no GPU."""
    file = folder / "cpu_gradients.pt"
    program = [sys.executable, "-m", "megatron_ttt.trial.cpu_gradients", str(file), *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(program, env=environment, check=True)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    file.unlink()
    return found


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    ours, theirs = found["gradients"], expected["gradients"]
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"gradients of {sorted(ours.keys() ^ theirs.keys())} on one side alone")
    gap = sum(float((ours[name] - right).double().square().sum()) for name, right in theirs.items())
    norm = sum(float(right.double().square().sum()) for right in theirs.values())
    return float((gap / norm) ** 0.5)


def profile(call: Call) -> Iterator[Cell]:
    """Write a step's Chrome trace, and the time under each of our labels."""
    words = ["+model=qwen3_1_7b", "train.seq_length=16384", "ttt.chunk_size=512"]
    config = load_config([*COMMON, *(words if call.is_full else TOY), "ttt=in_place"])
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if call.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    trace = call.folder / "step_trace.json"
    with distributed(config) as ranks:
        trainer, batch = random_trainer(config, ranks), rows_of(config, documents=4)
        trainer.train_step(repeat(batch), wants_norms=False)
        with torch.profiler.profile(activities=kinds) as found:
            trainer.train_step(repeat(batch), wants_norms=False)
        found.export_chrome_trace(str(trace))
    averages = {event.key: event for event in found.key_averages()}
    yield Cell("trace", str(trace), {"bytes": trace.stat().st_size})
    for label in Label:
        event = averages.get(label.value)
        if event is None:
            yield Cell(label.value, "did not happen: one rank needs no scan")
            continue
        spent = {"cpu_us": event.cpu_time_total, "device_us": event.device_time_total}
        shown = f"{event.count} times, {spent['cpu_us'] / 1e3:.2f} ms on the host"
        if call.device.type == "cuda":
            shown += f", {spent['device_us'] / 1e3:.2f} ms on the device"
        yield Cell(label.value, shown, spent)
