"""Counts what a step asks of a device, on meta tensors: they have shapes and no data.

A meta tensor stands for one on a GPU, a CPU tensor for the host's memory. :class:`DeviceCounter`
sees every operation of forward and backward, and stands in for three things that meta tensors lack:
the fused kernels of attention and norms, page-locked memory, and values that the host reads back.

Not seen: fusion by ``torch.compile`` (Megatron's ``jit_fuser``), which is switched off, so that its
few functions count one kernel per operation; and the kernels inside one operation.
"""

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
aten = torch.ops.aten

# They name memory that exists, or reserve some: no kernel runs.
_NO_KERNEL = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.lift_fresh,
}
# Their result's shape depends on data: the host waits until the device has it.
_SHAPE_FROM_DATA = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim}


class Phase(StrEnum):
    """Which half of the step an operation belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass
class Counts:
    """What one part of a step asks for.

    Attributes:
        kernels: operations on the device, views and allocations apart.
        bytes: read and written by them, each operand once.
        flops: of products and attention, causal attention counted as its half.
        syncs: times the host waits for the device: a value read back, a shape that depends on data.
        uploads: copies from the host to the device.
        pageable: those among them that wait, being not from page-locked memory or not asynchronous.
        host_operations: operations on CPU tensors.
        host_elements: elements that those produce.
        saved_bytes: memory kept for the backward, without parameters; each storage once.
    """

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    syncs: int = 0
    uploads: int = 0
    pageable: int = 0
    host_operations: int = 0
    host_elements: int = 0
    saved_bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Counts(**sums)


class DeviceCounter(TorchDispatchMode):
    """Counts operations by phase and part while it is entered.

    ``part`` names what the forward is in; an operation of the backward belongs to the part whose
    forward created its node of the graph.
    """

    def __init__(self, *, outside: str) -> None:
        """``outside``: the part of whatever runs outside every named part."""
        super().__init__()
        self.counts: dict[tuple[Phase, str], Counts] = defaultdict(Counts)
        self.part = outside
        self.pinned: dict[int, Tensor] = {}  # by storage; the tensors keep the numbers unique
        self._saved: dict[int, Tensor] = {}
        self._marks: list[tuple[int, str]] = [(0, outside)]  # first node of the graph, and its part
        self._outside = outside

    def enter_part(self, part: str) -> None:
        """From here on the forward is in ``part``."""
        self.part = part
        self._marks.append((torch._C._autograd._get_sequence_nr(), part))

    @contextlib.contextmanager
    def saving(self, excluded: Sequence[Tensor]) -> Iterator[None]:
        """Count what the graph built inside keeps for its backward, ``excluded`` apart."""
        known = {tensor.untyped_storage()._cdata for tensor in excluded}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_meta and storage._cdata not in known and storage._cdata not in self._saved:
                self._saved[storage._cdata] = tensor  # keeps the number from being used again
                self.counts[Phase.FORWARD, self.part].saved_bytes += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def total(self, phase: Phase | None = None) -> Counts:
        """Return the sum over parts, of one phase or of both."""
        chosen = [c for (at, _), c in self.counts.items() if phase is None or at is phase]
        return sum(chosen, Counts())

    def parts(self) -> list[str]:
        """Return the parts in the order in which they were met."""
        return list(dict.fromkeys(part for _, part in self.counts))

    def count_kernel(self, *operands: Tensor) -> None:
        """One kernel that reads and writes these tensors, where none is dispatched."""
        counts = self._counts_here()
        counts.kernels += 1
        counts.bytes += sum(_bytes(tensor) for tensor in operands)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        counts = self._counts_here()
        packet = func._overloadpacket
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in inputs if tensor.is_meta]
        if packet is aten._local_scalar_dense and on_device:
            counts.syncs += 1
            return 1.0 if args[0].dtype.is_floating_point else 1
        if packet in _SHAPE_FROM_DATA and on_device:
            counts.syncs += 1
            raise NotImplementedError(f"{func}: the result's shape depends on data of the device")
        if _is_copy(packet) and (moved := _between(packet, args, kwargs)) is not None:
            return self._copy(counts, func, args, kwargs, moved)
        if func is aten.baddbmm.dtype_out:  # no meta kernel is registered for it
            result = kwargs["out"]
        elif func is aten.bmm.dtype:
            result = args[0].new_empty(
                args[0].shape[0], args[0].shape[1], args[1].shape[2], dtype=args[2]
            )
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if _is_view(func) or packet in _NO_KERNEL:
            return result
        if not on_device and not any(tensor.is_meta for tensor in outputs):
            counts.host_operations += 1
            counts.host_elements += sum(tensor.numel() for tensor in outputs)
            return result
        counts.kernels += 1
        counts.bytes += sum(_bytes(t) for t in [*on_device, *outputs] if t.is_meta)
        counts.flops += _flops(packet, args, kwargs, result)
        return result

    def _counts_here(self) -> Counts:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.counts[Phase.FORWARD, self.part]
        number = node._sequence_nr()
        if number > self._marks[-1][0] + (1 << 60):  # leaves have the largest number there is
            return self.counts[Phase.BACKWARD, "gradients of parameters"]
        place = bisect.bisect_right(self._marks, number, key=lambda mark: mark[0]) - 1
        return self.counts[Phase.BACKWARD, self._marks[place][1]]

    def _copy(self, counts: Counts, func: Any, args: Any, kwargs: Any, upload: bool) -> Any:
        """Return a copy between host and device, either way."""
        if upload:
            source = args[1] if func._overloadpacket is aten.copy_ else args[0]
            asynchronous = kwargs.get("non_blocking") or True in args[2:3]
            counts.uploads += 1
            if not asynchronous or source.untyped_storage()._cdata not in self.pinned:
                counts.pageable += 1
            return func(*args, **kwargs)
        counts.syncs += 1
        if func._overloadpacket is aten.copy_:
            return args[0].fill_(1)
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)


class DeviceStandIns(TorchFunctionMode):
    """What a GPU has and meta tensors lack: page-locked memory, fused attention and norms.

    Attention with a mask is taken by cuDNN's kernel (grouped heads, additive bias), without one by
    flash attention; anything else would be slower still.
    """

    def __init__(self, counter: DeviceCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            self.counter.pinned[pinned.untyped_storage()._cdata] = pinned
            return pinned
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **kwargs)
        if func is F.rms_norm and args[0].is_meta:
            return _fused_norm(self.counter, *args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None:
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return out[0]
    bias = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    keep_sums = query.requires_grad and torch.is_grad_enabled()
    out = aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, keep_sums, dropout_p, is_causal, False, scale=scale
    )
    return out[0]


def _fused_norm(
    counter: DeviceCounter,
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    eps: float,
) -> Tensor:
    return _FusedNorm.apply(inputs, weight, counter)


class _FusedNorm(torch.autograd.Function):
    """A GPU's fused RMSNorm, which meta takes apart: one kernel forward, two backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, counter: DeviceCounter) -> Tensor:
        scale = inputs.new_empty(inputs.shape[:-1], dtype=torch.float32)
        outputs = torch.empty_like(inputs)
        ctx.save_for_backward(inputs, weight, scale)
        ctx.counter = counter
        counter.count_kernel(inputs, weight, scale, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, weight, scale = ctx.saved_tensors
        d_inputs, d_weight = torch.empty_like(inputs), torch.empty_like(weight)
        ctx.counter.count_kernel(grad, inputs, weight, scale, d_inputs)
        ctx.counter.count_kernel(grad, inputs, scale, d_weight)
        return d_inputs, d_weight, None


def _is_copy(packet: Any) -> bool:
    return packet in (aten._to_copy, aten.copy_)


def _between(packet: Any, args: Any, kwargs: Any) -> bool | None:
    """Return true for host to device, False for device to host, None within one of them."""
    if packet is aten.copy_:
        source, target = args[1].is_meta, args[0].is_meta
    else:
        device = kwargs.get("device")
        source = args[0].is_meta
        target = source if device is None else torch.device(device).type == "meta"
    return None if source == target else target


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def _bytes(tensor: Tensor) -> int:
    """Of the elements that exist: an expanded dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    if packet is aten.baddbmm_:
        packet, result = aten.baddbmm, args[0]
    if packet not in flop_registry:
        return 0
    if packet in (aten.bmm, aten.baddbmm):  # also with an output dtype, which the formulas refuse
        left, right = args[-3:-1] if isinstance(args[-1], torch.dtype) else args[-2:]
        return 2 * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
    flops: int = flop_registry[packet](*args, **kwargs, out_val=result)
    return flops // 2 if _is_causal(packet, args) else flops


def _is_causal(packet: Any, args: Any) -> bool:
    """Flash attention's flag, after dropout, or the window of packed documents: all before."""
    if str(packet) in ("torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"):
        return [-1, 0] in args
    place = {
        aten._scaled_dot_product_flash_attention: 4,
        aten._scaled_dot_product_flash_attention_backward: 11,
    }.get(packet)
    return place is not None and len(args) > place and bool(args[place])
