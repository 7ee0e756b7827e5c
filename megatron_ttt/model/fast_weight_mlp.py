"""A Megatron MLP whose down projection is a fast weight.

Megatron builds it from a ``ModuleSpec`` in place of its own MLP; parameters keep their Megatron
names, and two are added: ``ttt_conv.weight [H, 1, 5]`` and ``ttt_proj.weight [H, H / tp]``.

Tensor parallelism. ``W0``, the state and its gradient are split along ffn, so updates need no
communication; the target must be whole on every rank, but is computed in parts:

1. the MLP's input is gathered once; gate/up projections and the convolution both read it;
2. each rank projects onto its columns of ``W_target`` and the columns are all-gathered, whose
   backward reduce-scatters the partial target gradients;
3. so the projection's gradient is complete and the convolution's is partial (summed over tensor
   ranks once a step), and the target path's input gradient, partial too, joins the MLP's before
   the one reduce-scatter of the gather's backward. So ``linear_fc1`` must not reduce its own.

Shape letters: L local tokens (all of the span, not split by sequence parallelism), B rows,
H hidden, F ffn / tp.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ttt.config.schema import TargetSource
from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.scale import Clip, Normalize
from megatron_ttt.fast_weights.target import KERNEL_SIZE, target_from_source
from megatron_ttt.fast_weights.update import fast_weight_spans
from megatron_ttt.model.bare_weight import BareWeight
from megatron_ttt.model.remembered_scan import RememberedScan
from megatron_ttt.model.sequence_layout import ReadingSession, SequenceLayout
from megatron_ttt.parallel.collectives import replicate


@dataclass(frozen=True)
class FastWeightSettings:
    """The part of the configuration a fast-weight layer needs; see ``config/schema.py``."""

    learning_rate: float
    normalize: Normalize
    target: TargetSource
    conv: bool
    proj: bool
    clip: Clip | None


class FastWeightMLP(MLP):
    """``O_i = Z_i (W0 + eta S_i)^T`` with ``S`` written chunk by chunk; see the module's lines.

    A drop-in for Megatron's MLP: takes ``[L or L/tp, B, H]`` and the micro-batch's
    :class:`SequenceLayout`, returns the same shape and no bias. The layout arrives under the name
    ``padding_mask``, the one argument that Megatron hands through to the MLP in the plain and in
    the recomputed path alike.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        settings: FastWeightSettings,
        groups: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        if config.add_bias_linear:
            raise ValueError("add_bias_linear=True: a fast-weight layer has no bias")
        if config.fp8:
            raise ValueError(f"fp8={config.fp8}: a fast-weight layer computes in bf16 or fp32")
        super().__init__(
            config, submodules, tp_group=groups.tp, ffn_hidden_size=config.ffn_hidden_size
        )
        self.settings = settings
        self.layer = -1  # set by set_layer_number, counted from 0 over the whole model
        fc1 = self.linear_fc1
        fc1.sequence_parallel = fc1.allreduce_dgrad = False
        fc1.disable_grad_reduce = True
        hidden, tp = config.hidden_size, groups.tp.size()
        if settings.conv:
            self.ttt_conv = BareWeight(config, (hidden, 1, KERNEL_SIZE), None)
            # Megatron sums the gradients of parameters so marked over tensor ranks once a step.
            weight: Any = self.ttt_conv.weight
            weight.sequence_parallel = config.sequence_parallel
        if settings.proj:
            self.ttt_proj = BareWeight(config, (hidden, hidden // tp), 1)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's layer with its number, which starts at 1."""
        self.layer = layer_number - 1

    def forward(
        self, hidden_states: Tensor, padding_mask: SequenceLayout | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Apply and write the fast weight over one micro-batch; see the class."""
        layout = padding_mask
        assert layout is not None, "no layout reached the layer"
        inputs = self._whole(hidden_states)
        keys = self._keys(inputs)
        # Read before the target's weights, in the order in which Megatron gathers them.
        weight = self.linear_fc2()
        if layout.session is not None and layout.session.writes_fast_weights:
            outputs = self._continue(inputs, keys, weight, layout, layout.session)
        elif layout.plan is None:  # the same checkpoint with its fast weights switched off
            outputs = torch.nn.functional.linear(keys, weight)
        else:
            outputs = self._read_and_write(inputs, keys, weight, layout)
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(outputs, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(outputs, group=self.tp_group), None

    def _read_and_write(
        self, inputs: Tensor, keys: Tensor, weight: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """The down projection as a fast weight: ``[L, B, H]``, partial over tensor ranks."""
        assert layout.plan is not None
        targets = self.make_targets(self._source(inputs, layout).transpose(0, 1), layout.plan)
        output = fast_weight_spans(
            keys.transpose(0, 1),
            targets,
            weight,
            plan=layout.plan,
            learning_rate=self.settings.learning_rate,
            spans=len(layout.ranges),
            exchange=self._exchange(layout),
            clip=self.settings.clip,
            normalize=self.settings.normalize,
            reduce_sums=self.sum_over_tensor_ranks,
        )
        layout.state_squares[self.layer] = output.state_squares_BN
        # Megatron's reduction works in place on contiguous memory and silently loses a view's.
        return output.outputs_BTD.transpose(0, 1).contiguous()

    def _continue(
        self,
        inputs: Tensor,
        keys: Tensor,
        weight: Tensor,
        layout: SequenceLayout,
        session: ReadingSession,
    ) -> Tensor:
        """Inference: the session holds the rows' fast weights. ``[L, B, H]``, partial over tp."""
        outputs = session.read_fast_weight(
            self.layer,
            keys.transpose(0, 1),
            self._source(inputs, layout).transpose(0, 1),
            weight,
            make_targets=self.make_targets,
            reduce_sums=self.sum_over_tensor_ranks,
        )
        return outputs.transpose(0, 1).contiguous()

    def _whole(self, local: Tensor) -> Tensor:
        """All local tokens on each tensor rank; backward sums the ranks' partial gradients."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                local, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return replicate(local, group=self.tp_group)

    def _keys(self, inputs: Tensor) -> Tensor:
        """``Z = act(X Wg^T) * (X Wu^T)``: ``[L, B, F]``."""
        gate, up = self.linear_fc1(inputs)[0].chunk(2, dim=-1)
        return self.config.activation_func(gate) * up

    def _source(self, inputs: Tensor, layout: SequenceLayout) -> Tensor:
        """U, the target source: ``[L, B, H]``, whole on every tensor rank."""
        if self.settings.target is TargetSource.hidden_states:
            return inputs
        assert layout.embeddings is not None
        return self._whole(layout.embeddings)

    def keys_and_targets(
        self, hidden_states: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` writes of the same arguments, for those who measure it.

        Z ``[B, L, F]``, this tensor rank's columns, and V ``[B, L, H]``, whole on every rank.
        """
        assert layout.plan is not None
        inputs = self._whole(hidden_states)
        targets = self.make_targets(self._source(inputs, layout).transpose(0, 1), layout.plan)
        return self._keys(inputs).transpose(0, 1), targets

    def make_targets(self, source: Tensor, plan: ChunkPlan) -> Tensor:
        """``V = conv(U) @ W_target``: ``[B, L, H]`` to the same, whole on every tensor rank."""
        conv: Tensor | None = None
        proj: Tensor | None = None
        if self.settings.conv:
            conv = self.ttt_conv()
            if not self.config.sequence_parallel:  # else Megatron sums its gradient once a step
                conv = replicate(conv, group=self.tp_group)
        if self.settings.proj:
            proj = self.ttt_proj()
        targets = target_from_source(
            source, conv, proj, plan=plan, normalize=self.settings.normalize
        )
        if proj is None or self.tp_group.size() == 1:
            return targets
        return all_gather_last_dim_from_tensor_parallel_region(targets, group=self.tp_group)

    def _exchange(self, layout: SequenceLayout) -> RememberedScan | None:
        if layout.exchange is None:
            return None
        return RememberedScan(
            layout.exchange.for_layer(f"layer {self.layer}", observer=layout.scans.append),
            kept=layout.carries,
            layer=self.layer,
            # Megatron's recomputation runs the first of two forwards without gradients.
            will_run_again=self.training and not torch.is_grad_enabled(),
        )

    def sum_over_tensor_ranks(self, sums: Tensor) -> Tensor:
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(sums, group=self.tp_group)
        return sums
