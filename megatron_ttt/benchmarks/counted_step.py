"""Forward and backward of one micro-batch on meta tensors: what a GPU would be asked for.

The configuration is the one a GPU gets (bf16, Megatron's fused functions) and the model is built,
fed and differentiated by the code that trains; see ``device_counter.py`` for what is counted.
The communicator is torch's fake one: this is rank 0 of a layout, its messages arrive at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLP
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ttt.benchmarks.device_counter import (
    META,
    Counts,
    DeviceCounter,
    DeviceStandIns,
    Phase,
)
from megatron_ttt.config.derived import model_parallel_size
from megatron_ttt.config.schema import Config
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.data.rows import Batch, make_batch
from megatron_ttt.model import build
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.parallel.cpu import megatron_on
from megatron_ttt.parallel.scan_group import ScanGroup
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.step import ForwardStep

MICRO_BATCH, ENDS = "micro-batch", "logits and loss"
# The part of the step that a module is, by the end of its name; the longest match counts.
PARTS = {
    "embedding": "embedding",
    "decoder": "norms and residuals",
    "self_attention": "projections and rope",
    "self_attention.core_attention": "attention",
    "output_layer": ENDS,
}


@contextmanager
def meta_ranks(config: Config) -> Iterator[Ranks]:
    """Rank 0 of the configuration's layout, with "cuda" meaning meta."""
    with ExitStack() as stack:
        stack.enter_context(megatron_on(META))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        dist.init_process_group(
            "fake", store=FakeStore(), rank=0, world_size=model_parallel_size(config.parallel)
        )
        stack.callback(dist.destroy_process_group)
        # The other ranks send nothing, so what they run cannot be compared.
        stack.enter_context(mock.patch.object(ScanGroup, "check_equal"))
        here = stack.enter_context(model_parallel(config))
        yield replace(here, device=META)


def build_meta_model(config: Config, ranks: Ranks) -> Any:
    """Return the rank's stage as a GPU would have it, without values."""
    with mock.patch.object(build, "initialize"):  # meta tensors take no values
        transformer = transformer_config(config, device_is_cuda=True)
        return build.build_model(config, transformer, ranks.groups).to(ranks.device)


def random_batch(config: Config, documents: int) -> Batch:
    """Rows of equally long documents, in page-locked memory as the loader gives them."""
    generator = torch.Generator().manual_seed(config.train.seed)
    rows, length = config.train.micro_batch_size, config.train.seq_length
    eod = config.model.vocab_size - 1
    text_BR = torch.randint(0, eod, (rows, length + 1), generator=generator)
    text_BR[:, length // documents - 1 : -1 : length // documents] = eod
    return make_batch(text_BR, range(rows), eod=eod, pad=None).pin_memory()


def count_step(config: Config, *, documents: int = 1) -> DeviceCounter:
    """Count forward and backward of one micro-batch.

    Args:
        config: bf16 is what a GPU takes; the world is one copy of the model.
        documents: in each row.
    """
    counter = DeviceCounter(outside=MICRO_BATCH)
    with meta_ranks(config) as ranks, DeviceStandIns(counter):
        model = build_meta_model(config, ranks)
        scan = scan_settings(config.parallel, ranks.scan_group)
        step = ForwardStep(config, ranks, scan=scan, mode=config.ttt.mode)
        batch = random_batch(config, documents)
        with counter:
            with naming_parts(model, counter), counter.saving(list(model.parameters())):
                output, loss = step(iter([batch]), model)
                counter.enter_part(ENDS)
                total: Tensor = loss(output)[0]
            total.backward()
    return counter


def part_of(name: str, module: torch.nn.Module) -> str | None:
    """Return the part that a module of this name is, or None where it belongs to what calls it."""
    if isinstance(module, FastWeightMLP):
        return "fast-weight MLP"
    if isinstance(module, MLP):
        return "plain MLP"
    fitting = [end for end in PARTS if name == end or name.endswith("." + end)]
    return PARTS[max(fitting, key=len)] if fitting else None


@contextmanager
def naming_parts(model: torch.nn.Module, counter: DeviceCounter) -> Iterator[None]:
    """Tell the counter which part runs, by hooks on the modules that are one."""
    stack: list[str] = []

    def enter(part: str) -> Any:
        def hook(*args: Any) -> None:
            stack.append(counter.part)
            counter.enter_part(part)

        return hook

    def leave(part: str) -> Any:
        def hook(*args: Any) -> None:
            before = stack.pop()
            # what follows the output layer is the loss
            counter.enter_part(ENDS if part == ENDS else before)

        return hook

    with ExitStack() as handles:
        for name, module in model.named_modules():
            part = part_of(name, module)
            if part is not None:
                for handle in (
                    module.register_forward_pre_hook(enter(part)),
                    module.register_forward_hook(leave(part)),
                ):
                    handles.callback(handle.remove)
        yield


@dataclass(frozen=True)
class CountedStep:
    """What was counted, of which model."""

    model: str
    layers: int
    tokens: int
    counter: DeviceCounter

    def rows(self) -> list[tuple[str, Counts, Counts]]:
        """(part, forward, backward) and their sum in the end."""
        counts = self.counter.counts
        parts = [
            (
                part,
                counts.get((Phase.FORWARD, part), Counts()),
                counts.get((Phase.BACKWARD, part), Counts()),
            )
            for part in self.counter.parts()
        ]
        total = ("all", self.counter.total(Phase.FORWARD), self.counter.total(Phase.BACKWARD))
        met = [row for row in parts if row[1:] != (Counts(), Counts())]
        return [*met, total]


def measure(config: Config, *, documents: int) -> CountedStep:
    """Count a step of this configuration."""
    counter = count_step(config, documents=documents)
    tokens = config.train.micro_batch_size * config.train.seq_length
    return CountedStep(config.model.name, config.model.layers, tokens, counter)


def as_record(counted: CountedStep, words: Sequence[str], documents: int) -> dict[str, Any]:
    """Every number, for a file."""
    return {
        "overrides": list(words),
        "documents": documents,
        "layers": counted.layers,
        "tokens": counted.tokens,
        "parts": {
            part: {"forward": asdict(forward), "backward": asdict(backward)}
            for part, forward, backward in counted.rows()
        },
    }


def report(counted: CountedStep, console: Console) -> None:
    """Print the table: forward and backward of each part."""
    table = Table(title=f"{counted.model}, {counted.layers} layers, {counted.tokens} tokens")
    table.add_column("part")
    for heading in ("kernels", "GB moved", "TFLOP", "waits", "uploads", "on the host", "saved GB"):
        table.add_column(heading, justify="right")
    for part, forward, backward in counted.rows():
        both = (forward, backward)
        table.add_row(
            part,
            " + ".join(f"{counts.kernels:,}" for counts in both),
            " + ".join(f"{counts.bytes / 1e9:.1f}" for counts in both),
            " + ".join(f"{counts.flops / 1e12:.1f}" for counts in both),
            str(sum(counts.syncs for counts in both)),
            f"{sum(c.uploads for c in both)} ({sum(c.pageable for c in both)} pageable)",
            f"{sum(c.host_operations for c in both):,}",
            f"{forward.saved_bytes / 1e9:.2f}",
        )
    console.print(table)
    console.print("a + b: forward + backward; waits: the host waits for a value of the device")
