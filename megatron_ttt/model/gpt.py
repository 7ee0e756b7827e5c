"""Megatron's GPTModel with fast-weight layers: positions, input embeddings, padded vocabulary.

Shape letters: B batch rows, L tokens of this rank, H hidden, E head dim, W vocabulary / tp.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ttt.config.schema import ModelConfig
from megatron_ttt.model.loss_head import losses_in_pieces
from megatron_ttt.model.rope import inverse_frequencies
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.rule import TargetSource

EXTRA_STATE = "_extra_state"


class _JoinGradient(torch.autograd.Function):
    """Identity on the block's input; its backward adds what the leaf's readers contributed.

    Every fast-weight layer lies behind the block's input, so their backward, which accumulates
    into the leaf's gradient, has run when this one is reached. The leaf comes boxed: as an input
    of this function its gradient would be held back until this backward is over.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, boxed_leaf: tuple[Tensor]) -> Tensor:
        ctx.boxed_leaf = boxed_leaf
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (leaf,) = ctx.boxed_leaf
        ctx.boxed_leaf = None
        return (grad if leaf.grad is None else grad + leaf.grad), None


class InPlaceTTTModel(GPTModel):
    """A GPTModel whose chosen layers have fast weights.

    Differences from Megatron's: rotary angles come from the layout's positions (any CP order,
    restarting at documents on request); input embeddings enter the target path as a detached leaf
    per micro-batch, so that recomputation sees an argument and no closure over a graph; rows that
    only pad the vocabulary are masked out of the logits, so that padding to a multiple of tp
    changes no loss.
    """

    inverse_frequencies: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        block_spec: TransformerBlockSubmodules,
        *,
        model: ModelConfig,
        target: TargetSource | None,
        padded_vocab_size: int,
        max_sequence_length: int,
        loss_tokens: int | None,
        groups: ProcessGroupCollection,
    ) -> None:
        """Build this rank's pipeline stage.

        Args:
            config: Megatron's configuration.
            block_spec: the stage's layers (``layer_specs.decoder_block_spec``).
            model: the architecture.
            target: where targets are read, ``None`` without fast weights.
            padded_vocab_size: rows of the embedding over all tensor ranks.
            max_sequence_length: longest row.
            loss_tokens: about how many tokens have logits at a time where losses are wanted;
                ``None``: all.
            groups: process groups.
        """
        stage = groups.pp.rank()
        super().__init__(
            config,
            block_spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=stage == 0,
            post_process=stage == groups.pp.size() - 1,
            share_embeddings_and_output_weights=model.tied_embeddings,
            # Angles come from the layout's positions. Megatron's table would have max_seqlen_q rows
            # (this rank's tokens), cut over the ranks once more.
            position_embedding_type="none",
            pg_collection=groups,
        )
        self.target, self.loss_tokens = target, loss_tokens
        frequencies = inverse_frequencies(model.rope, model.head_dim)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)
        if self.post_process:
            columns = padded_vocab_size // groups.tp.size()
            real = min(max(model.vocab_size - groups.tp.rank() * columns, 0), columns)
            if real < columns:
                self.output_layer.register_forward_hook(_MaskPadding(real))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's view of a checkpoint, of tensors alone.

        Modules' "extra state" is where fp8 keeps its scales. There is no fp8 here, so it is empty,
        and which modules have one depends on the attention backend: none is stored.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's, of what :meth:`sharded_state_dict` names: modules keep their extra state."""
        own = {k: v for k, v in self.state_dict().items() if k.endswith(EXTRA_STATE)}
        return super().load_state_dict({**own, **state_dict}, strict, assign)

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple:
        """Megatron's, with angles ``[L, B or 1, 1, E]`` and the embedding leaf put in place."""
        layout: SequenceLayout = kwargs["packed_seq_params"]
        embedded, _, *rest = super()._preprocess(*args, **kwargs)
        recomputes = self.config.recompute_granularity is not None and torch.is_grad_enabled()
        if recomputes and self.pre_process and not embedded.requires_grad:
            # A recomputed layer has a backward only where its input asks for one.
            embedded = embedded.detach().requires_grad_()
        if self.target is TargetSource.input_embeddings and self.pre_process:
            # Also where the embedding is frozen the layers must see a leaf they can add to.
            layout.embeddings = embedded.detach().requires_grad_(embedded.requires_grad)
            embedded = _JoinGradient.apply(embedded, (layout.embeddings,))
        return (embedded, self._angles(layout), *rest)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's, on the positions whose logits a session wants, or piece by piece."""
        layout: SequenceLayout = kwargs["packed_seq_params"]
        labels: Tensor | None = kwargs["labels"]
        if self.post_process and labels is not None and self.loss_tokens is not None:
            gathers = self.config.sequence_parallel
            return losses_in_pieces(
                hidden_states,
                labels,
                self._losses,
                tokens=self.loss_tokens,
                gathered=self.pg_collection.tp.size() if gathers else 1,
            )
        if layout.session is not None:
            hidden_states = layout.session.select_hidden(hidden_states)
        return super()._postprocess(hidden_states, *args, **kwargs)

    def _losses(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        losses: Tensor = self.compute_language_model_loss(labels, logits)
        return losses

    def _angles(self, layout: SequenceLayout) -> Tensor:
        assert layout.positions is not None
        positions = layout.positions.transpose(0, 1)[:, :, None, None].float()
        half = positions * self.inverse_frequencies
        return torch.cat([half, half], dim=-1)


class _MaskPadding:
    """Forward hook: logits of vocabulary rows from ``real`` on become minus infinity."""

    def __init__(self, real: int) -> None:
        self.real = real

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        logits, bias = output
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.real
        return logits.masked_fill(padding, float("-inf")), bias
