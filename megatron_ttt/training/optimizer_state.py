"""AdamW's state inside Megatron's distributed checkpoints, above all its count of steps.

torch's AdamW counts in a tensor per parameter, Transformer Engine's FusedAdam in the parameter
group; the latter refuses to describe a state that holds anything but its moments.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    with _step_left_alone(optimizer):
        optimizer.load_state_dict(state)
    _separate_steps(optimizer)
    for group in _groups(optimizer):
        own = settings[_key(group)]
        group.update({name: own[name] for name in own if name not in _NOT_SETTINGS})


def adam_steps(optimizer: MegatronOptimizer) -> set[float]:
    """The ``step`` values of all parameters: one value, unless something is wrong."""
    return {
        float(holder["step"])
        for part in _parts(optimizer)
        for holder in (*part.optimizer.state.values(), *part.optimizer.param_groups)
        if "step" in holder
    }


def _groups(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    for part in _parts(optimizer):
        yield from part.optimizer.param_groups


def _key(group: dict[str, Any]) -> tuple[int, ...]:
    """Loading makes new groups of the same parameters."""
    return tuple(id(parameter) for parameter in group["params"])


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
