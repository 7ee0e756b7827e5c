"""What a generated token costs with fast weights, against the same model without.

At batch 1 the effective weight is one matrix as the plain one is, and the two read equally many
bytes. At batch B each row has a matrix of its own, so decoding, which is bound by reading weights,
cannot cost less than the bytes say: the floor stands beside the time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_ttt.hf import Qwen3TTTConfig, Qwen3TTTForCausalLM
from megatron_ttt.hf.reader import TransformersReader

VOCABULARY = 4096


@dataclass(frozen=True)
class DecodingProblem:
    """A Qwen3-shaped model; every sixth layer has fast weights.

    Each round decodes one chunk of tokens, so that it holds one write of every row.
    """

    hidden: int = 512
    ffn: int = 1536
    layers: int = 12
    chunk: int = 128
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 5
    dtype: str = "fp32"
    device: str = "cpu"


@dataclass(frozen=True)
class DecodingTime:
    """Milliseconds a token and step; ``floor`` is the ratio of bytes of weights that are read."""

    batch: int
    with_fast_weights: float
    without: float
    floor: float

    @property
    def ratio(self) -> float:
        return self.with_fast_weights / self.without


def measure(problem: DecodingProblem) -> list[DecodingTime]:
    """Alternating rounds with and without; medians."""
    model = _model(problem)
    return [_measure_batch(problem, model, batch) for batch in problem.batches]


def report(problem: DecodingProblem, times: list[DecodingTime], console: Console) -> None:
    """Print the table of one run."""
    console.print(" ".join(f"{key}={value}" for key, value in asdict(problem).items()))
    table = Table("batch", "ms a step, fast weights", "ttt=off", "ratio", "floor of bytes")
    for row in times:
        table.add_row(
            str(row.batch),
            f"{row.with_fast_weights:.2f}",
            f"{row.without:.2f}",
            f"{row.ratio:.3f}",
            f"{row.floor:.3f}",
        )
    console.print(table)


def as_record(problem: DecodingProblem, times: list[DecodingTime]) -> dict[str, Any]:
    """Everything that ``report`` shows, for a file."""
    return {"problem": asdict(problem), "times": [{**asdict(t), "ratio": t.ratio} for t in times]}


def _model(problem: DecodingProblem) -> Any:
    torch.manual_seed(0)
    config = Qwen3TTTConfig(
        vocab_size=VOCABULARY,
        hidden_size=problem.hidden,
        intermediate_size=problem.ffn,
        num_hidden_layers=problem.layers,
        num_attention_heads=problem.hidden // 64,
        num_key_value_heads=max(1, problem.hidden // 256),
        head_dim=64,
        ttt_chunk=problem.chunk,
        ttt_lr=1e-3,
    )
    model = Qwen3TTTForCausalLM(config)
    for layer in config.ttt_layers or []:
        torch.nn.init.normal_(model.model.layers[layer].mlp.ttt_conv.weight, std=0.5)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if problem.dtype not in dtypes:
        raise ValueError(f"dtype {problem.dtype!r}: one of {', '.join(dtypes)}")
    return model.eval().to(problem.device, dtypes[problem.dtype])


def _measure_batch(problem: DecodingProblem, model: Any, batch: int) -> DecodingTime:
    prompt = torch.randint(VOCABULARY, (batch, 2 * problem.chunk)).tolist()
    readers = {}
    for mode in (True, False):
        model.config.ttt_mode = mode
        readers[mode] = TransformersReader(model, batch=batch)
        readers[mode].read_last(prompt)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(problem.rounds):
        for mode, reader in readers.items():
            model.config.ttt_mode = mode
            started = time.perf_counter()
            for _ in range(problem.chunk):
                logits = reader.read_last([[7]] * batch)
            float(logits.sum())  # waits for the device
            seconds[mode].append((time.perf_counter() - started) / problem.chunk)
    states = readers[True].cache.fast_weights
    assert all(state.state_BDF is not None and state.pending[0] == 0 for state in states.values())
    fast = len(model.config.ttt_layers) * problem.hidden * problem.ffn
    read = sum(parameter.numel() for parameter in model.parameters())
    read -= VOCABULARY * problem.hidden  # the embedding: one row a token
    read -= sum(parameter.numel() for name, parameter in model.named_parameters() if "ttt_" in name)
    return DecodingTime(
        batch=batch,
        with_fast_weights=1e3 * median(seconds[True]),
        without=1e3 * median(seconds[False]),
        floor=(read + (batch - 1) * fast) / read,
    )
