"""A Megatron MLP whose down projection is a fast weight.

Megatron builds it from a ``ModuleSpec`` in place of its own MLP; parameters keep their Megatron
names, and those that the update rule adds (``rule.py``) join them: ``ttt_conv.weight [H, 1, K]``,
``ttt_proj.weight [H, H / tp]``, and a write rule's own.

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

from dataclasses import replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
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

from megatron_ttt.fast_weights.documents import ChunkPlan
from megatron_ttt.fast_weights.target import target_from_source
from megatron_ttt.fast_weights.update import fast_weight_scan
from megatron_ttt.fast_weights.write_rules import TokenInputs, Write, WriteCall, write
from megatron_ttt.model.bare_weight import BareWeight
from megatron_ttt.model.conv_passes import conv_passes
from megatron_ttt.model.remembered_scan import RememberedScan
from megatron_ttt.model.sequence_layout import ReadingSession, SequenceLayout
from megatron_ttt.parallel.collectives import replicate
from megatron_ttt.rule import (
    CONV,
    PROJ,
    ParameterSpec,
    Placement,
    TargetSource,
    UpdateRule,
    added_parameters,
    reads_hidden_apart,
    write_parameters,
)


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
        rule: UpdateRule,
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
        self.rule = rule
        self.layer = -1  # set by set_layer_number, counted from 0 over the whole model
        fc1 = self.linear_fc1
        fc1.sequence_parallel = fc1.allreduce_dgrad = False
        fc1.disable_grad_reduce = True
        self.added = added_parameters(rule)
        for name, spec in self.added.items():
            self._add(name, spec, config, groups.tp.size())

    def _add(self, name: str, spec: ParameterSpec, config: TransformerConfig, tp: int) -> None:
        """Make this tensor rank's part of a parameter that the update rule adds."""
        module, attribute = name.split(".")
        assert attribute == "weight", f"{name}: a bare module holds a weight"
        shape = list(spec.sizes(config.hidden_size))
        axis = None
        if spec.placement is Placement.columns:
            axis = len(shape) - 1
            shape[axis] //= tp
        self.add_module(module, BareWeight(config, tuple(shape), axis))
        if spec.placement is Placement.whole:
            # Megatron sums the gradients of parameters so marked over tensor ranks once a step.
            weight: Any = getattr(self, module).weight
            weight.sequence_parallel = config.sequence_parallel

    def _parameter(self, name: str) -> Tensor | None:
        """Return a parameter that the rule adds, as this rank computes with it, or ``None``."""
        if name not in self.added:
            return None
        value: Tensor = getattr(self, name.split(".")[0])()
        if self.added[name].placement is Placement.whole and not self.config.sequence_parallel:
            return replicate(value, group=self.tp_group)  # sums its gradient in the backward
        return value

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's number, from 1; Megatron's layer calls it."""
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
        """Return the down projection as a fast weight: ``[L, B, H]``, partial over tensor ranks."""
        assert layout.plan is not None
        tokens = self._token_inputs(inputs, keys, layout)
        rule = replace(self.rule, eta=layout.eta_factor * self.rule.eta)
        output = fast_weight_scan(
            tokens.keys_BTF,
            self._write(tokens, layout.plan, rule, weight),
            weight,
            plan=layout.plan,
            eta=rule.eta,
            spans=len(layout.ranges),
            exchange=self._exchange(layout),
            wants_norms=layout.wants_norms,
        )
        if layout.wants_norms:
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
            self.layer, self._token_inputs(inputs, keys, layout), weight, self.make_write
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
        gate_up = self.linear_fc1(inputs)[0]
        if self.config.bias_activation_fusion:  # one kernel, which keeps its input alone
            fused: Tensor = bias_swiglu_impl(gate_up, None)
            return fused
        gate, up = gate_up.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up

    def _source(self, inputs: Tensor, layout: SequenceLayout) -> Tensor:
        """U, the target source: ``[L, B, H]``, whole on every tensor rank."""
        if self.rule.target is TargetSource.hidden_states:
            return inputs
        assert layout.embeddings is not None
        return self._whole(layout.embeddings)

    def _token_inputs(self, inputs: Tensor, keys: Tensor, layout: SequenceLayout) -> TokenInputs:
        """Return what the rule reads of each token, batch first; keys: this rank's columns."""
        hidden = inputs.transpose(0, 1) if reads_hidden_apart(self.rule) else None
        source = self._source(inputs, layout).transpose(0, 1)
        return TokenInputs(keys.transpose(0, 1), source, hidden)

    def keys_and_write(self, hidden_states: Tensor, layout: SequenceLayout) -> tuple[Tensor, Write]:
        """Z ``[B, L, F]`` (this tensor rank's columns) and what :meth:`forward` writes.

        For those who measure it; arguments as for :meth:`forward`.
        """
        assert layout.plan is not None
        inputs = self._whole(hidden_states)
        tokens = self._token_inputs(inputs, self._keys(inputs), layout)
        return tokens.keys_BTF, self.make_write(tokens, layout.plan, self.rule)

    def make_write(self, tokens: TokenInputs, plan: ChunkPlan, rule: UpdateRule) -> Write:
        """Return what tokens write, its targets whole on every tensor rank.

        Args:
            tokens: ``[B, L, ...]``, keys split over tensor ranks; every rank must call.
            plan: of the same tokens.
            rule: this layer's, or another that has its parameters.
        """
        return self._write(tokens, plan, rule, self.linear_fc2())

    def _write(
        self, tokens: TokenInputs, plan: ChunkPlan, rule: UpdateRule, weight: Tensor
    ) -> Write:
        targets = self._targets(tokens.source_BTH, plan, rule)
        own = {name: self._parameter(name) for name in write_parameters(rule)}
        call = WriteCall(rule, plan, weight, own, self.sum_over_tensor_ranks)
        return write(tokens, targets, call)

    def _targets(self, source: Tensor, plan: ChunkPlan, rule: UpdateRule) -> Tensor:
        """``V = conv(U) @ W_target``: ``[B, L, H]`` to the same, whole on every tensor rank."""
        conv, proj = self._parameter(CONV), self._parameter(PROJ)
        targets = target_from_source(
            source,
            conv,
            proj,
            plan=plan,
            conv=rule.conv,
            normalize=rule.normalize,
            passes=conv_passes(source),
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
