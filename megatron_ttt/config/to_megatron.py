"""The one place where our configuration becomes Megatron-core's, for both supported lines."""

import importlib.util
import math

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ttt.config import derived
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import (
    AttentionBackend,
    ComputeConfig,
    Config,
    ParallelConfig,
    PassConfig,
    Precision,
    Recompute,
)


def compute_dtype(config: ComputeConfig, *, device_is_cuda: bool | None = None) -> torch.dtype:
    """Return the dtype of parameters and activations.

    Args:
        config: a valid configuration.
        device_is_cuda: the run is on a GPU; ``None``: as torch finds this machine.
    """
    cuda = torch.cuda.is_available() if device_is_cuda is None else device_is_cuda
    precision = derived.resolve_precision(config.train.precision, cuda=cuda)
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def transformer_engine_present() -> bool:
    """Whether Megatron-core can use Transformer Engine: the one answer, asked on GPUs alone.

    Raises:
        ConfigError: the package is installed and cannot be imported; training without it would be
            slower for a reason that nobody is told.
    """
    if not HAVE_TE and importlib.util.find_spec("transformer_engine") is not None:
        message = (
            "the installed transformer_engine cannot be imported (built against another torch?); "
            "python -c 'import transformer_engine.pytorch' shows why; mend or uninstall it"
        )
        raise ConfigError([Fault("model.attention", "auto", message)])
    return bool(HAVE_TE)


def transformer_config(
    config: ComputeConfig, *, device_is_cuda: bool, deterministic: bool = False
) -> TransformerConfig:
    """Megatron's view of the model and of how it is spread over ranks.

    Megatron initialises nothing: values come from ``model/initialize.py``. Its loss is summed, not
    averaged, per micro-batch (``calculate_per_token_loss=True``) and divided once by the tokens of
    the step.
    Rotary angles and YaRN's attention factor are the model's own (``model/rope.py``): Megatron is
    told nothing of YaRN, or its attention would apply the factor a second time.

    Args:
        config: a valid configuration.
        device_is_cuda: the model will live on a GPU.
        deterministic: Megatron takes kernels that give the same bits every time.
    """
    model, parallel = config.model, config.parallel
    dtype = compute_dtype(config, device_is_cuda=device_is_cuda)
    window = model.sliding_window
    backend = derived.resolve_attention(
        config,
        cuda=device_is_cuda,
        transformer_engine=device_is_cuda and transformer_engine_present(),
    ).value
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # YaRN scales queries and keys alike, which is one factor on their products
        softmax_scale=derived.attention_factor(model.rope) ** 2 / math.sqrt(model.head_dim),
        # Megatron counts the tokens to the left of the query, we count the query as well
        window_size=(window - 1, 0) if window is not None else None,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=derived.sequence_parallel(parallel),
        context_parallel_size=parallel.cp,
        cp_comm_type=parallel.cp_comm_type if parallel.cp > 1 else None,
        pipeline_model_parallel_size=parallel.pp,
        pipeline_dtype=dtype,
        variable_seq_lengths=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        # Megatron marks tensor-parallel parameters only where it initialises them, so it is given
        # a draw that does nothing: its own depend on the layout, ours do not.
        perform_initialization=True,
        init_method=_leave_alone,
        output_layer_init_method=_leave_alone,
        use_cpu_initialization=not device_is_cuda,
        deterministic_mode=deterministic,
        transformer_impl=(
            "transformer_engine" if backend is AttentionBackend.transformer_engine else "local"
        ),
        masked_softmax_fusion=False,  # neither attention backend has a softmax of its own
        bias_activation_fusion=device_is_cuda,
        bias_dropout_fusion=device_is_cuda,
        gradient_accumulation_fusion=device_is_cuda and _has_apex_accumulation(),
        **_recompute_arguments(config.train),
    )


def _leave_alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def optimizer_config(config: Config, *, device_is_cuda: bool | None = None) -> OptimizerConfig:
    """AdamW with fp32 master weights, sharded over data-parallel ranks by choice.

    Args:
        config: a valid configuration.
        device_is_cuda: as in :func:`compute_dtype`.
    """
    optimizer = config.optimizer
    cuda = torch.cuda.is_available() if device_is_cuda is None else device_is_cuda
    dtype = compute_dtype(config, device_is_cuda=device_is_cuda)
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=derived.overlap(config.parallel, cuda=cuda).param_gather,
    )


def ddp_config(parallel: ParallelConfig, *, device_is_cuda: bool) -> DistributedDataParallelConfig:
    """Gradients are summed in fp32 and never averaged: the loss is divided by the step's tokens."""
    overlap = derived.overlap(parallel, cuda=device_is_cuda)
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        average_in_collective=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        bucket_size=parallel.bucket_size,
    )


def _recompute_arguments(train: PassConfig) -> dict[str, object]:
    if train.recompute is Recompute.none:
        return {}
    if train.recompute is Recompute.full:
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {
        "recompute_granularity": "selective",
        "recompute_modules": list(train.recompute_modules),
    }


def _has_apex_accumulation() -> bool:
    """apex's kernel that adds weight gradients into the fp32 buffer inside the product."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
