"""A weight that its layer reads itself, instead of calling a linear module with activations."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter


class BareWeight(MegatronModule):
    """One weight with its place in tensor-parallel checkpoints; calling the module returns it.

    Read it by calling the module, never through ``.weight`` in a forward: Megatron hooks the calls
    of modules to wait for weights that are still being gathered
    (``parallel.overlap_param_gather``), and ``.weight`` alone may hold those of the step before.
    """

    def __init__(
        self, config: TransformerConfig, shape: tuple[int, ...], tp_axis: int | None
    ) -> None:
        """Make a weight of zeros; values come from ``initialize.py`` or from a checkpoint.

        Args:
            config: Megatron's configuration.
            shape: of this rank's shard.
            tp_axis: the dim that is split over tensor ranks, ``None``: each holds the whole.
        """
        super().__init__(config=config)
        self.tp_axis = tp_axis
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
        if tp_axis is not None:
            set_tensor_model_parallel_attributes(self.weight, True, tp_axis, 1)

    def forward(self) -> Tensor:
        """Return the weight, whole as far as data-parallel ranks share it."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Megatron's checkpoint view of the weight (see ``MegatronModule``)."""
        axes = {} if self.tp_axis is None else {"weight": self.tp_axis}
        state = {"weight": self.weight}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


class BareDownProjection(BareWeight):
    """W0 ``[H, F / tp]`` where Megatron's MLP builds its second linear module.

    Takes whatever the MLP of either megatron-core line passes to that module.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        tp_group: Any,
        **unused: Any,
    ) -> None:
        super().__init__(config, (output_size, input_size // tp_group.size()), 1)
