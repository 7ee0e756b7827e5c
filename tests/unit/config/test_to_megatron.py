"""What Megatron-core is told, field by field."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)

from megatron_ttt.config import to_megatron
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.load import CONFIG_DIR
from megatron_ttt.config.overrides import group_options
from megatron_ttt.config.to_megatron import (
    compute_dtype,
    ddp_config,
    optimizer_config,
    transformer_config,
)
from tests.unit.config.compose import configured

MODELS = group_options(CONFIG_DIR)["model"]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, cuda: bool) -> None:
    config = configured(f"+model={name}")
    model = config.model
    found = transformer_config(config, device_is_cuda=cuda)
    assert (found.num_layers, found.hidden_size) == (model.layers, model.hidden_size)
    assert (found.ffn_hidden_size, found.kv_channels) == (model.ffn_hidden_size, model.head_dim)
    assert (found.num_attention_heads, found.num_query_groups) == (model.heads, model.kv_groups)
    assert (found.normalization, found.layernorm_epsilon) == ("RMSNorm", model.norm_epsilon)
    assert found.qk_layernorm is model.qk_norm
    assert found.gated_linear_unit and found.activation_func is F.silu
    assert not found.add_bias_linear and not found.add_qkv_bias
    assert found.hidden_dropout == found.attention_dropout == 0.0
    assert found.calculate_per_token_loss, "or the loss depends on the layout"
    kept = torch.randn(3)
    for method in (found.init_method, found.output_layer_init_method):
        assert torch.equal(method(kept.clone()), kept), "or the start depends on the layout"
    assert found.softmax_scale == pytest.approx(model.head_dim**-0.5)
    assert found.params_dtype is (torch.bfloat16 if cuda else torch.float32)
    assert found.bf16 is cuda and not found.fp16
    assert found.use_cpu_initialization is not cuda


def test_sliding_window_counts_the_query() -> None:
    config = configured("+model=tiny")
    assert transformer_config(config, device_is_cuda=False).window_size == (127, 0)
    whole = configured("+model=tiny", "model.sliding_window=null")
    assert transformer_config(whole, device_is_cuda=False).window_size is None


def test_parallel_sizes() -> None:
    words = ["parallel.tp=2", "parallel.cp=4", "parallel.pp=2", "parallel.cp_comm_type=a2a"]
    found = transformer_config(configured("+model=qwen3_4b", *words), device_is_cuda=False)
    assert (found.tensor_model_parallel_size, found.context_parallel_size) == (2, 4)
    assert found.pipeline_model_parallel_size == 2
    assert found.pipeline_dtype is torch.float32
    assert found.sequence_parallel
    assert found.cp_comm_type == "a2a"
    off = configured("+model=qwen3_4b", *words, "parallel.sequence_parallel=off")
    assert not transformer_config(off, device_is_cuda=False).sequence_parallel


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, None, None)),
        (["train.recompute=full"], ("full", "uniform", 1)),
        (["train.recompute=selective"], ("selective", None, None)),
    ],
)
def test_recomputation(words: list[str], expected: tuple[str | None, str | None, int]) -> None:
    found = transformer_config(configured("+model=tiny", *words), device_is_cuda=False)
    assert (
        found.recompute_granularity, found.recompute_method, found.recompute_num_layers
    ) == expected  # fmt: skip


def test_recomputed_modules() -> None:
    words = ["train.recompute=selective", "train.recompute_modules=[layernorm,mlp]"]
    found = transformer_config(configured("+model=tiny", *words), device_is_cuda=False)
    assert found.recompute_modules == ["layernorm", "mlp"]


def test_megatron_is_told_nothing_of_yarn() -> None:
    # the model scales attention by YaRN's factor itself; Megatron would do it again
    config = configured("+experiment=qwen3_4b_128k_yarn")
    found = transformer_config(config, device_is_cuda=False)
    assert _yarn_get_concentration_factor_from_config(found) == 1.0
    assert found.softmax_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 128**0.5)


def test_precision_asked_for_wins() -> None:
    config = configured("+model=tiny", "train.precision=fp32")
    assert compute_dtype(config, device_is_cuda=True) is torch.float32
    assert not optimizer_config(config, device_is_cuda=True).bf16


def test_optimizer() -> None:
    words = ["optimizer.lr=0.25", "optimizer.min_lr=0.125", "optimizer.weight_decay=0.5",
             "optimizer.beta1=0.8", "optimizer.beta2=0.7", "optimizer.epsilon=1e-3",
             "optimizer.clip_grad=3"]  # fmt: skip
    found = optimizer_config(configured("+model=tiny", *words), device_is_cuda=True)
    assert (found.lr, found.min_lr, found.weight_decay) == (0.25, 0.125, 0.5)
    assert (found.adam_beta1, found.adam_beta2, found.adam_eps) == (0.8, 0.7, 1e-3)
    assert (found.clip_grad, found.optimizer) == (3.0, "adam")
    assert found.decoupled_weight_decay, "AdamW"
    assert found.bf16 and found.params_dtype is torch.bfloat16
    assert found.use_distributed_optimizer


def test_gradients_are_summed_in_fp32() -> None:
    words = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
             "parallel.bucket_size=7"]  # fmt: skip
    found = ddp_config(configured("+model=tiny", *words).parallel, device_is_cuda=False)
    assert found.grad_reduce_in_fp32 and not found.average_in_collective
    assert found.use_distributed_optimizer
    assert found.overlap_grad_reduce and found.overlap_param_gather
    assert found.bucket_size == 7


def test_an_engine_that_cannot_be_imported_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(to_megatron, "HAVE_TE", False)
    config = configured("+model=tiny")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert transformer_config(config, device_is_cuda=True).transformer_impl == "local"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert transformer_config(config, device_is_cuda=False).transformer_impl == "local"
    with pytest.raises(ConfigError, match="transformer_engine cannot be imported"):
        transformer_config(config, device_is_cuda=True)


@pytest.mark.parametrize(
    ("words", "cuda", "reduce", "gather"),
    [
        ([], True, True, True),
        ([], False, False, False),
        (["parallel.distributed_optimizer=false"], True, True, False),
        (["parallel.overlap_grad_reduce=false"], True, False, False),
        (["parallel.overlap_param_gather=false"], True, True, False),
        (["parallel.overlap_grad_reduce=true"], False, True, False),
    ],
)
def test_what_overlaps_unless_it_is_said(
    words: list[str], cuda: bool, reduce: bool, gather: bool
) -> None:
    config = configured("+model=tiny", *words)
    found = ddp_config(config.parallel, device_is_cuda=cuda)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == (reduce, gather)
    optimizer = optimizer_config(config, device_is_cuda=cuda)
    assert optimizer.overlap_param_gather is gather
