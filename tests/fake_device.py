"""A device that is not there: what the tests of device mistakes share.

Two kinds of tensors without values find what only a GPU would have shown:

- *fake* tensors (``FakeTensorMode``) say "cuda" and refuse to meet a CPU tensor, to be read by the
  host, or to decide a shape; forward and validation run on them;
- *meta* tensors also run backward, under a counter (``megatron_ttt/benchmarks/device_counter.py``).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ttt.benchmarks.counted_step import build_meta_model
from megatron_ttt.benchmarks.device_counter import META
from megatron_ttt.config.derived import model_parallel_size
from megatron_ttt.config.schema import Config, TTTMode
from megatron_ttt.data.rows import Batch
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.target import PLAIN
from megatron_ttt.model import fast_weight_mlp
from megatron_ttt.model.scan_settings import scan_settings
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.model.varlen_attention import PackedSpan, pack
from megatron_ttt.parallel.cpu import megatron_on
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.step import ForwardStep
from tests.unit.config.compose import configured


@contextmanager
def fake_group(*, ranks: int) -> Iterator[Any]:
    """Rank 0 of a group whose messages arrive at once and hold nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextmanager
def model_on_fake_cuda(
    config: Config, batch: Batch
) -> Iterator[tuple[Any, dict[TTTMode, SequenceLayout]]]:
    """Rank 0's stage and a micro-batch's layouts with fast weights on and off, on "cuda".

    Tensors made inside are fake. Stage and layouts are made outside, on meta and on the CPU, where
    their code reads values: random states, and the integers of the chunk plan. Without gradients:
    torch ends the process where a graph is built for a device that it was not built for.
    """
    with ExitStack() as stack:
        ranks = model_parallel_size(config.parallel)
        stack.enter_context(fake_group(ranks=ranks))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        with megatron_on(META):
            here = stack.enter_context(model_parallel(config))
            model = build_meta_model(config, replace(here, device=META))
            on_cpu = replace(here, device=torch.device("cpu"))
            scan = scan_settings(config.parallel, on_cpu.scan_group)
            layouts = {
                mode: _packed(ForwardStep(config, on_cpu, scan=scan, mode=mode).layout(batch))
                for mode in TTTMode
            }
        stack.enter_context(fake_cuda())
        stack.enter_context(torch.no_grad())
        on_cuda = {mode: like_on_cuda(layout) for mode, layout in layouts.items()}
        yield model.to_empty(device="cuda"), on_cuda


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made inside are fake; "cuda" is a device that refuses what a GPU would refuse.

    A product with an output of another dtype has no fake form: operands are converted instead.
    """
    accumulate = "megatron_ttt.fast_weights.accumulate._torch_has_wide_output"
    with (
        mock.patch(accumulate, lambda: False),
        mock.patch.object(fast_weight_mlp, "conv_passes", lambda tokens: PLAIN),  # no kernel runs
        FakeTensorMode(allow_non_fake_inputs=True),
        megatron_on(torch.device("cuda", 0)),
        _WithoutDriver(),
    ):
        yield


class _WithoutDriver(TorchFunctionMode):
    """By aten's operations what torch's own methods ask the driver for before they run."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.requires_grad_:  # there are no gradients here
            return args[0]
        if func is Tensor.contiguous:
            return torch.ops.aten.contiguous(args[0])
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        tensor, index, *values = args
        by_tensors = _tensors_of(index)
        if func is Tensor.__getitem__:
            return torch.ops.aten.index(tensor, by_tensors) if by_tensors else _part(tensor, index)
        value = values[0] if isinstance(values[0], Tensor) else tensor.new_full((), values[0])
        if by_tensors:
            return torch.ops.aten.index_put_(tensor, by_tensors, value)
        return torch.ops.aten.copy_(_part(tensor, index), value)


def _tensors_of(index: Any) -> list[Tensor | None] | None:
    """An index by tensors and whole dims, as aten takes it; ``None`` for any other."""
    index = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(place, Tensor) for place in index):
        return None
    assert all(isinstance(place, Tensor) or place == slice(None) for place in index), index
    return [place if isinstance(place, Tensor) else None for place in index]


def _part(tensor: Tensor, index: Any) -> Tensor:
    """The view ``tensor[index]``, of whole numbers, slices, ``None`` and ``...``."""
    index = index if isinstance(index, tuple) else (index,)
    named = sum(1 for place in index if place is not None and place is not Ellipsis)
    dim = 0
    for place in index:
        if place is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif place is Ellipsis:
            dim += tensor.dim() - dim - named
        elif isinstance(place, slice):
            step = place.step or 1
            tensor = torch.ops.aten.slice(tensor, dim, place.start, place.stop, step)
            dim, named = dim + 1, named - 1
        elif isinstance(place, int):
            tensor, named = torch.ops.aten.select(tensor, dim, place), named - 1
        else:
            raise NotImplementedError(f"an index of {type(place).__name__} on a fake device")
    return tensor


def _packed(layout: SequenceLayout) -> SequenceLayout:
    """A layout made on the CPU with what a GPU's would have besides."""
    assert layout.attention is not None
    return replace(layout, packed=pack(layout.attention, torch.device("cpu")))


def like_on_cuda(value: Any) -> Any:
    """A fake tensor on "cuda" of the same shape; records with their tensors so replaced."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    if isinstance(value, tuple):
        return tuple(like_on_cuda(part) for part in value)
    if isinstance(value, ChunkPlan | SequenceLayout | PackedSpan):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: like_on_cuda(getattr(value, name)) for name in names})
    return value


def shaped(words: Sequence[str], *, layers: int = 2) -> Config:
    """A model of ``configs/model`` in its real shapes, of a few layers, the first one fast.

    ``words``: overrides, ``+model=...`` among them.
    """
    config = configured(*words, "run.dry_run=true", "train.precision=bf16")
    config.model.layers = layers
    if config.ttt.layers is not None:
        config.ttt.layers = [0]
    return config
