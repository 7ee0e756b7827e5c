"""AdamW's state inside Megatron's distributed checkpoints, above all its count of steps.

torch's AdamW counts in a tensor per parameter, Transformer Engine's FusedAdam in the parameter
group; the latter refuses to describe a state that holds anything but its moments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

_NOT_SETTINGS = ("params", "step")  # what loading is for


def prime_adam(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state it creates in its first step, so that there is one to load.

    Others need none: Megatron makes their moments when it loads.
    """
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` with a ``step`` of its own for every parameter.

    Settings of parameter groups (learning rates, betas) stay those of this run's configuration.
    """
    settings = {_key(group): dict(group) for group in _groups(optimizer)}
    # In fp32 the optimizer's tensors are views of the parameters themselves.
    with torch.no_grad(), _step_left_alone(optimizer):
        optimizer.load_state_dict(state)
    _separate_steps(optimizer)
    for group in _groups(optimizer):
        own = settings[_key(group)]
        group.update({name: own[name] for name in own if name not in _NOT_SETTINGS})


def adam_steps(optimizer: MegatronOptimizer) -> set[float]:
    """Return the ``step`` values of all parameters: one value, unless something is wrong."""
    found: set[float] = set()
    for part in _parts(optimizer):
        per_parameter = [state for state in part.optimizer.state.values() if "step" in state]
        # A group's own count is FusedAdam's; torch's AdamW has one from a load and never moves it.
        holders = per_parameter or [g for g in part.optimizer.param_groups if "step" in g]
        found |= {float(holder["step"]) for holder in holders}
    return found


def _groups(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    for part in _parts(optimizer):
        yield from part.optimizer.param_groups


def _key(group: dict[str, Any]) -> tuple[int, ...]:
    """Identify a group of parameters: loading makes new groups of the same ones."""
    return tuple(id(parameter) for parameter in group["params"])


def bucket_sizes(optimizer: MegatronOptimizer) -> list[Any]:
    """Parameters in each bucket of a distributed optimizer, without what pads it to its ranks.

    They do not depend on the number of data-parallel ranks; optimizer state that was saved bucket
    by bucket loads where they are equal.
    """
    return [
        [size for sizes in buffer.values() for size in sizes]
        for part in _parts(optimizer)
        for buffer in getattr(part, "per_bucket_numel_unpadded", [])
    ]


@contextmanager
def padding_between_buckets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let Megatron find each parameter's state in what it has gathered for a checkpoint.

    ``get_parameter_state_dp_zero`` leaves out what pads a bucket to the data-parallel ranks, and
    its reader ``sharded_param_state_fully_reshardable`` counts it (both supported lines; it warns
    of a "param range exceeds unpadded buffer"): behind such a bucket every parameter is saved from
    another's place. Tied embeddings with several stages, and overlapped gradients, make several
    buckets. Inside this context the padding is put back, as zeros that nothing reads.
    """
    undo = []
    for part in _parts(optimizer):
        gathered = getattr(part, "get_parameter_state_dp_zero", None)
        if gathered is not None:  # a distributed optimizer
            part.get_parameter_state_dp_zero = partial(_padded_state, part, gathered)
            undo.append(part)
    try:
        yield
    finally:
        for part in undo:
            del part.get_parameter_state_dp_zero


def _padded_state(part: Any, gathered: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    state = gathered(*args, **kwargs)
    if state is None:  # another rank holds it
        return None
    for place, buffer in enumerate(part.buffers):
        for tensors in state[place].values():
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    pieces = tensor.split([bucket.numel_unpadded for bucket in buffer.buckets])
                    whole = tensor.new_zeros(sum(b.grad_data.numel() for b in buffer.buckets))
                    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
                        whole[bucket.offset : bucket.offset + len(piece)] = piece
                    tensors[key] = whole
    return state


def saves_by_bucket(optimizer: MegatronOptimizer) -> bool:
    """Whether Megatron can save this rank's part of the state bucket by bucket.

    It saves no bucket of which a rank holds no parameter, and misplaces the padding behind the last
    parameter where that is not all padding to the ranks (``sharded_param_state_dp_reshardable`` of
    both supported lines: the piece ends beyond the tensor, and the save fails).
    """
    for part in _parts(optimizer):
        for place, buffer in enumerate(getattr(part, "gbuf_ranges", [])):
            group = part.data_parallel_group
            for number, bucket in enumerate(
                held for buckets in buffer.values() for held in buckets
            ):
                whole = part.buffers[place].buckets[number]
                size = whole.grad_data.numel() // group.size()
                first = group.rank() * size
                ends = [ranges["gbuf_local"].end for ranges in bucket["param_map"].values()]
                if not ends or first + max(ends) < whole.numel_unpadded < first + size:
                    return False
    return True


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


@contextmanager
def _step_left_alone(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Megatron copies every entry of AdamW's state, but stores ``step`` elsewhere: hand it back."""
    undo = []
    for part in _parts(optimizer):
        original = getattr(part, "_set_main_param_and_optimizer_states", None)
        if original is None:  # not a distributed optimizer: its state is loaded as it is
            continue

        def keeping_step(
            parameter: Tensor, tensors: dict[str, Tensor], part: Any = part, set_: Any = original
        ) -> None:
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            step = part.optimizer.state[main].get("step")
            set_(parameter, {**tensors, "step": step} if step is not None else tensors)

        part._set_main_param_and_optimizer_states = keeping_step
        undo.append(part)
    try:
        yield
    finally:
        for part in undo:
            del part._set_main_param_and_optimizer_states


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """One ``step`` tensor per parameter.

    Megatron assigns the same tensor to all of them, and AdamW increments it in place once per
    parameter.
    """
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].detach().clone()
