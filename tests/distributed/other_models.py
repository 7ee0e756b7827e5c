"""Our layers without ``GPTModel``: what docs/decisions/hybrid-model.md tried, kept runnable.

:func:`own_model` is a ``LanguageModule`` of our own around Megatron's ``TransformerBlock``;
:func:`hybrid_model` is megatron-core 0.19's ``HybridModel`` with whole layers in its slots. Both
stand in for ``InPlaceTTTModel`` in training; what inference needs is left out.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_ttt.model.gpt import EXTRA_STATE, _JoinGradient, _MaskPadding
from megatron_ttt.model.layer_specs import FastWeightTransformerLayer, torch_layer_spec
from megatron_ttt.model.norm import RMSNorm
from megatron_ttt.model.rope import inverse_frequencies
from megatron_ttt.model.sequence_layout import SequenceLayout
from megatron_ttt.rule import TargetSource


def angles(layout: SequenceLayout, frequencies: Tensor) -> Tensor:
    """``[L, B or 1, 1, E]`` from the layout's positions."""
    assert layout.positions is not None
    half = layout.positions.transpose(0, 1)[:, :, None, None].float() * frequencies
    return torch.cat([half, half], dim=-1)


def embed(model: Any, input_ids: Tensor, position_ids: Tensor, layout: SequenceLayout) -> Any:
    """The first stage's embeddings, with the leaf that targets are read from."""
    if not model.pre_process:
        return None
    embedded = model.embedding(input_ids=input_ids, position_ids=position_ids)
    if model.target is TargetSource.input_embeddings:
        layout.embeddings = embedded.detach().requires_grad_(embedded.requires_grad)
        embedded = _JoinGradient.apply(embedded, (layout.embeddings,))
    return embedded


def mask_padding(model: Any, *, vocab_size: int, padded_vocab_size: int, groups: Any) -> None:
    """Vocabulary rows that only fill up are masked out of the logits."""
    columns = padded_vocab_size // groups.tp.size()
    real = min(max(vocab_size - groups.tp.rank() * columns, 0), columns)
    if model.post_process and real < columns:
        model.output_layer.register_forward_hook(_MaskPadding(real))


class _TensorsAlone:
    """Checkpoints without extra state, as those of ``InPlaceTTTModel``."""

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}

    def load_state_dict(self: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        own = {k: v for k, v in self.state_dict().items() if k.endswith(EXTRA_STATE)}
        return super().load_state_dict({**own, **state}, *args, **kwargs)


class OwnModel(_TensorsAlone, LanguageModule):
    """Embedding, Megatron's ``TransformerBlock``, output layer, loss."""

    def __init__(
        self,
        config: Any,
        block_spec: Any,
        *,
        model: Any,
        target: TargetSource | None,
        padded_vocab_size: int,
        max_sequence_length: int,
        loss_tokens: int | None,
        groups: Any,
    ) -> None:
        super().__init__(config=config, pg_collection=groups)
        stage = groups.pp.rank()
        self.pre_process, self.post_process = stage == 0, stage == groups.pp.size() - 1
        tied = self.share_embeddings_and_output_weights = model.tied_embeddings
        self.vp_stage = None
        self.model_type = ModelType.encoder_or_decoder
        self.target = target
        self.inverse_frequencies = inverse_frequencies(model.rope, model.head_dim)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type="none",
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
        )
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and tied,
                tp_group=groups.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        mask_padding(
            self, vocab_size=model.vocab_size, padded_vocab_size=padded_vocab_size, groups=groups
        )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by Megatron's schedules with what the stage before sends."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: None,
        *,
        labels: Tensor,
        packed_seq_params: SequenceLayout,
    ) -> Tensor:
        hidden = self.decoder(
            hidden_states=embed(self, input_ids, position_ids, packed_seq_params),
            attention_mask=None,
            rotary_pos_emb=angles(packed_seq_params, self.inverse_frequencies),
            packed_seq_params=packed_seq_params,
        )
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return self.compute_language_model_loss(labels, logits)


class _Angles(nn.Module):
    """Stands where HybridModel has its rotary embedding: it is asked for the length first, with the
    layout, and then for the angles, with that length.
    """

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies

    def get_rotary_seq_len(self, *args: Any) -> Any:
        return args[-1]

    def forward(self, layout: SequenceLayout, packed_seq: bool = False) -> Tensor:
        return angles(layout, self.frequencies)


def hybrid_model(pattern: str) -> type:
    """``HybridModel`` with our whole plain layer as ``*`` and our fast layer as ``E``.

    Raises ``ImportError`` where megatron-core has none.
    """
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    class Stack(HybridStack):
        """The final norm under the name that our checkpoints have."""

        final_norm = property(lambda self: self.final_layernorm)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if "final_norm" in self._modules:
                self._modules["final_layernorm"] = self._modules.pop("final_norm")

    class Hybrid(_TensorsAlone, HybridModel):
        def __init__(self, config: Any, block_spec: Any, *, model: Any, **kwargs: Any) -> None:
            groups, padded = kwargs["groups"], kwargs["padded_vocab_size"]
            plain = torch_layer_spec(qk_norm=config.qk_layernorm)
            fast = [s for s in block_spec.layer_specs if s.module is FastWeightTransformerLayer]
            slots = HybridStackSubmodules(attention_layer=plain, moe_layer=fast[0])
            super().__init__(
                config,
                ModuleSpec(module=Stack, submodules=slots),
                padded,
                kwargs["max_sequence_length"],
                pattern,
                pre_process=groups.pp.rank() == 0,
                post_process=groups.pp.rank() == groups.pp.size() - 1,
                share_embeddings_and_output_weights=model.tied_embeddings,
                position_embedding_type="rope",
                pg_collection=groups,
            )
            self.target = kwargs["target"]
            frequencies = inverse_frequencies(model.rope, model.head_dim)
            self.rotary_pos_emb = _Angles(frequencies)
            mask_padding(self, vocab_size=model.vocab_size, padded_vocab_size=padded, groups=groups)

        def forward(
            self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            embedded = embed(self, input_ids, position_ids, kwargs["packed_seq_params"])
            given = {**kwargs, "decoder_input": embedded}
            return super().forward(input_ids, position_ids, *args, **given)

    return Hybrid


# HybridStack builds its final norm from Transformer Engine, whatever the spec says.
FINAL_NORM = ("megatron.core.models.hybrid.hybrid_block.TENorm", RMSNorm)
