"""Megatron-core on CPU: the same code, gloo instead of NCCL, no second code path.

Megatron-core asks for ``device="cuda"`` by name in its schedules, optimizers, tensor-parallel
mappings and checkpoints. Where no GPU is present, :func:`megatron_on_cpu` gives those names a CPU
meaning, and does nothing else: a torch function mode maps the device, and the table
:func:`patches` lists every attribute that is replaced, one line each, with its reason. With a GPU
the context does nothing at all, so no patch can reach a CUDA run.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# Megatron's optimizers sort parameters by the name of their tensor type.
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class CudaNames(TorchFunctionMode):
    """Maps ``device="cuda..."`` to another device in every torch call.

    Also drops ``pin_memory=True``, which needs a driver, and lets ``Tensor.type()`` answer the
    CUDA name of a floating dtype, by which Megatron's optimizers recognise parameters.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = _TYPE_NAMES.get(args[0].dtype)
            return name if name is not None else func(*args)
        if "device" in kwargs:
            kwargs["device"] = self._mapped(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            args = tuple(self._mapped(value) for value in args)
        return func(*args, **kwargs)

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("cuda"):
            return self.device
        if isinstance(value, torch.device) and value.type == "cuda":
            return self.device
        return value


class _Stream:
    """The one order of work a CPU has: waiting for it is always over."""

    def wait_stream(self, stream: Any) -> None:
        """Everything issued before has finished."""

    def wait_event(self, event: Any) -> None:
        """Everything issued before has finished."""

    def synchronize(self) -> None:
        """Everything issued before has finished."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in the place of a CUDA call."""


def _same(tensor_or_module: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor_or_module


def _get_cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _one_stream(*args: Any, **kwargs: Any) -> _Stream:
    return _Stream()


@dataclass(frozen=True)
class Patch:
    """``module.attribute`` is ``replacement`` while the context is open, because of ``reason``."""

    module: str
    attribute: str
    replacement: Callable[..., Any]
    reason: str


_RANDOM = "megatron.core.tensor_parallel.random"


def patches(device: torch.device) -> tuple[Patch, ...]:
    """Everything that is replaced so that "cuda" means ``device``."""
    return (
        Patch("torch.cuda", "current_device", lambda: device, "buffers are allocated on it"),
        Patch(
            "torch.cuda", "synchronize", _nothing, "schedules and checkpoints wait for the device"
        ),
        Patch(
            "torch.cuda", "current_stream", _one_stream, "schedules and the scan order work by it"
        ),
        Patch("torch.cuda", "default_stream", _one_stream, "gradient buckets order work by it"),
        Patch("torch.cuda", "empty_cache", _nothing, "called when parameters are offloaded"),
        Patch("torch.cuda", "set_device", _nothing, "checkpoint writers choose a device"),
        Patch("torch.cuda", "manual_seed", torch.manual_seed, "the RNG tracker forks named states"),
        Patch("torch.cuda", "get_rng_state", _get_cpu_rng_state, "as above"),
        Patch("torch.cuda", "set_rng_state", _set_cpu_rng_state, "as above"),
        Patch(_RANDOM, "_get_cuda_rng_state", _get_cpu_rng_state, "recomputation restores it"),
        Patch(_RANDOM, "_set_cuda_rng_state", _set_cpu_rng_state, "recomputation restores it"),
        Patch("torch", "Tensor.cuda", _same, "tensors are where they should be"),
        Patch("torch", "nn.Module.cuda", _same, "modules are where they should be"),
    )


@contextmanager
def megatron_on(device: torch.device) -> Iterator[None]:
    """Run Megatron-core with "cuda" meaning ``device``: the CPU, or meta to count what it asks."""
    table = patches(device)
    # All are imported before any is replaced: torch compares functions while it is imported.
    modules = [importlib.import_module(patch.module) for patch in table]
    with ExitStack() as stack:
        for patch, module in zip(table, modules, strict=True):
            owner: Any = module
            *path, name = patch.attribute.split(".")
            for part in path:
                owner = getattr(owner, part)
            stack.enter_context(mock.patch.object(owner, name, patch.replacement))
        stack.enter_context(CudaNames(device))
        yield


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Run Megatron-core on CPU inside this context; a plain pass-through where a GPU is present."""
    if torch.cuda.is_available():
        yield
        return
    with megatron_on(CPU):
        yield
