"""Every family with fast weights, as ``transformers`` classes.

Without a cache a call reads its rows whole, differentiably, by the code that trains
(``fast_weight_scan``); with one it continues the cache's fast weights (``FastWeightState``). Both
give the same logits. ``config.ttt_mode = False`` switches fast weights off at any time.

Rows may be padded before or after their tokens (a two-dimensional ``attention_mask``); padding
takes no place on the chunk grid. Without mask and cache, ``position_ids`` that restart are
documents packed into one row, as they are for ``transformers``' attention, and reset the fast
weights too.

Shape suffixes: B batch rows, T tokens, D hidden, F ffn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from megatron_ttt.hf.cache import FastWeightCache
from megatron_ttt.hf.configuration import (
    LlamaTTTConfig,
    MistralTTTConfig,
    Qwen2TTTConfig,
    Qwen3TTTConfig,
    fast_layers,
)
from megatron_ttt.hf.mlp import (
    AddedWeight,
    CallLayout,
    FastWeightMLP,
    call_layout,
)
from megatron_ttt.rule import Start

# Each mixin stands before a class of transformers that has the methods it calls by super().


class _LayerMixin:
    """A decoder layer that hands the call's layout to its MLP, and to nothing else."""

    def _use_fast_weights(self: Any, config: Any, layer: int) -> None:
        if layer in fast_layers(config):
            self.mlp = FastWeightMLP(config, layer)

    def forward(
        self: Any, hidden_states: Tensor, *, fast_weights: CallLayout | None = None, **kwargs: Any
    ) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        inputs = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, FastWeightMLP):
            return hidden_states + self.mlp(inputs, fast_weights)
        return hidden_states + self.mlp(inputs)


class _WeightsMixin:
    """Initial values of what the update rule adds, for training and for plain checkpoints."""

    config: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, AddedWeight):
            super()._init_weights(module)  # type: ignore[misc]
        elif module.start is Start.zeros:
            init.zeros_(module.weight)
        else:
            diagonal = module.weight.new_empty(len(module.weight))
            init.copy_(module.weight, diagonal.normal_(std=self.config.initializer_range).diag())


class _ModelMixin:
    """The decoder: makes each call's layout and passes it to the layers."""

    config: Any
    layer_class: Any  # of the family, with fast weights

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index in range(config.num_hidden_layers):
            self.layers[index] = self.layer_class(config, index)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the parent's; see the module's lines for what masks and positions mean.

        Without ``past_key_values`` and with gradients enabled, ``use_cache`` defaults to False.

        Raises:
            ValueError: a cache of another class, a cache where gradients are wanted, a mask that is
                not ``[B, T]``, padding between a row's tokens.
        """
        one_input = (input_ids is None) != (inputs_embeds is None)
        if not self.config.ttt_mode or not one_input:  # the parent explains what is wrong
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if use_cache is None:
            use_cache = self.config.use_cache and not learns
        if use_cache and past_key_values is None:
            past_key_values = FastWeightCache(self.config)
        if past_key_values is not None:
            _check_cache(past_key_values, learns=learns)
        layout = call_layout(
            inputs_embeds, attention_mask, position_ids, past_key_values, self.config
        )
        return super().forward(  # type: ignore[misc]
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            fast_weights=layout,
            **kwargs,
        )


class _CausalMixin:
    """The language model, and ``generate()`` with a cache that carries fast weights."""

    config: Any
    plain_class: Any  # of the family
    decoder_class: Any  # of the family, with fast weights

    def __init__(self: Any, config: Any) -> None:
        # The plain decoder is never built.
        super(self.plain_class, self).__init__(config)  # type: ignore[call-arg]
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not self.config.ttt_mode:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
            return
        if generation_mode is GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding takes tokens back, which fast weights cannot; "
                "generate without an assistant, or set ttt_mode=False"
            )
        if generation_config.use_cache is False:
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={kind!r} cannot carry fast weights: leave it out, or set "
                "'dynamic' or 'offloaded'"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = FastWeightCache(self.config, offloading=kind == "offloaded")
            model_kwargs["past_key_values"] = cache
        else:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        if isinstance(cache, FastWeightCache):
            stop = generation_config._eos_token_tensor
            cache.start_turn(() if stop is None else stop.flatten().tolist())

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        *args: Any,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if isinstance(past_key_values, FastWeightCache) and not is_first_iteration:
            past_key_values.begin_step(input_ids[:, -1])
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            *args,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def _check_cache(cache: Any, *, learns: bool) -> None:
    if not isinstance(cache, FastWeightCache):
        raise ValueError(
            f"{type(cache).__name__} cannot carry fast weights: pass a megatron_ttt.hf."
            "FastWeightCache(model.config), or set ttt_mode=False"
        )
    if learns:
        raise ValueError(
            "a cache carries fast weights without gradients: call under torch.no_grad(), or "
            "without a cache (use_cache=False)"
        )


class Qwen3TTTDecoderLayer(_LayerMixin, Qwen3DecoderLayer):
    """See :class:`_LayerMixin`."""

    def __init__(self, config: Qwen3TTTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._use_fast_weights(config, layer_idx)


class Qwen3TTTPreTrainedModel(_WeightsMixin, Qwen3PreTrainedModel):
    """Base of the Qwen3 classes."""

    config_class = Qwen3TTTConfig
    config: Qwen3TTTConfig
    _no_split_modules = ["Qwen3TTTDecoderLayer"]  # noqa: RUF012


class Qwen3TTTModel(_ModelMixin, Qwen3TTTPreTrainedModel, Qwen3Model):
    """Qwen3's decoder with fast weights."""

    layer_class = Qwen3TTTDecoderLayer


class Qwen3TTTForCausalLM(_CausalMixin, Qwen3TTTPreTrainedModel, Qwen3ForCausalLM):
    """Qwen3 with fast weights and a language-model head."""

    plain_class, decoder_class = Qwen3ForCausalLM, Qwen3TTTModel


class LlamaTTTDecoderLayer(_LayerMixin, LlamaDecoderLayer):
    """See :class:`_LayerMixin`."""

    def __init__(self, config: LlamaTTTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._use_fast_weights(config, layer_idx)
        self.window = config.sliding_window

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As the mixin's; kernels without a mask are told of the window, as Mistral's are."""
        return super().forward(hidden_states, sliding_window=self.window, **kwargs)


class LlamaTTTPreTrainedModel(_WeightsMixin, LlamaPreTrainedModel):
    """Base of the LLaMA classes."""

    config_class = LlamaTTTConfig
    config: LlamaTTTConfig
    _no_split_modules = ["LlamaTTTDecoderLayer"]  # noqa: RUF012


class WindowedLlamaModel(LlamaModel):
    """LLaMA's decoder with the window of its configuration, by which alone Mistral's differs."""

    forward = MistralModel.forward


class LlamaTTTModel(_ModelMixin, LlamaTTTPreTrainedModel, WindowedLlamaModel):
    """LLaMA's decoder with fast weights."""

    layer_class = LlamaTTTDecoderLayer


class LlamaTTTForCausalLM(_CausalMixin, LlamaTTTPreTrainedModel, LlamaForCausalLM):
    """LLaMA with fast weights and a language-model head."""

    plain_class, decoder_class = LlamaForCausalLM, LlamaTTTModel


class Qwen2TTTDecoderLayer(_LayerMixin, Qwen2DecoderLayer):
    """See :class:`_LayerMixin`."""

    def __init__(self, config: Qwen2TTTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._use_fast_weights(config, layer_idx)


class Qwen2TTTPreTrainedModel(_WeightsMixin, Qwen2PreTrainedModel):
    """Base of the Qwen2 classes."""

    config_class = Qwen2TTTConfig
    config: Qwen2TTTConfig
    _no_split_modules = ["Qwen2TTTDecoderLayer"]  # noqa: RUF012


class Qwen2TTTModel(_ModelMixin, Qwen2TTTPreTrainedModel, Qwen2Model):
    """Qwen2's decoder with fast weights."""

    layer_class = Qwen2TTTDecoderLayer


class Qwen2TTTForCausalLM(_CausalMixin, Qwen2TTTPreTrainedModel, Qwen2ForCausalLM):
    """Qwen2 with fast weights and a language-model head."""

    plain_class, decoder_class = Qwen2ForCausalLM, Qwen2TTTModel


class MistralTTTDecoderLayer(_LayerMixin, MistralDecoderLayer):
    """See :class:`_LayerMixin`."""

    def __init__(self, config: MistralTTTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._use_fast_weights(config, layer_idx)


class MistralTTTPreTrainedModel(_WeightsMixin, MistralPreTrainedModel):
    """Base of the Mistral classes."""

    config_class = MistralTTTConfig
    config: MistralTTTConfig
    _no_split_modules = ["MistralTTTDecoderLayer"]  # noqa: RUF012


class MistralTTTModel(_ModelMixin, MistralTTTPreTrainedModel, MistralModel):
    """Mistral's decoder with fast weights."""

    layer_class = MistralTTTDecoderLayer


class MistralTTTForCausalLM(_CausalMixin, MistralTTTPreTrainedModel, MistralForCausalLM):
    """Mistral with fast weights and a language-model head."""

    plain_class, decoder_class = MistralForCausalLM, MistralTTTModel
