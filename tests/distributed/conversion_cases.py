"""Tiny random Hugging Face models of every family, and Megatron's logits for them on real ranks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed import P2POp, batch_isend_irecv

from megatron_ttt.config.derived import ttt_layers
from megatron_ttt.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerKind,
    TrainConfig,
    TTTConfig,
)
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.conversion.importing import CONTENT
from megatron_ttt.conversion.loading import load_hf_weights
from megatron_ttt.conversion.plain_rows import plain_rows
from megatron_ttt.model.build import build_model
from megatron_ttt.model.initialize import global_parameters
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training.distributed import Ranks, model_parallel

VOCABULARY = 1003  # no multiple of any tp
LENGTH = 40
CHUNK = 8


@dataclass(frozen=True)
class Case:
    """A family's model by the keys of its ``config.json``."""

    name: str
    model_type: str
    keys: dict[str, Any] = field(default_factory=dict)


_SIZES = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES = (
    Case(
        "qwen3, 4 heads a group, wide heads, tied",
        "qwen3",
        {
            "hidden_size": 48,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 14,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
    ),
    Case(
        "llama, 8 heads a group, llama3 rope, untied",
        "llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "rope_theta": 5e5,
            "rope_scaling": _LLAMA3,
            "rms_norm_eps": 1e-5,
        },
    ),
    Case(
        "qwen2, 1 head a group, biases, tied",
        "qwen2",
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "mistral, window, untied",
        "mistral",
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 9,
        },
    ),
    Case(
        "qwen3, yarn, window, untied",
        "qwen3",
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_scaling": _YARN,
            "use_sliding_window": True,
            "sliding_window": 17,
            "max_window_layers": 0,
        },
    ),
)


def save_hf_model(case: Case, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Write a random model of a case in several files; every tensor differs from its neighbours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.model_type, **_SIZES, **case.keys)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).eval().save_pretrained(folder, max_shard_size="100KB")
    return model


def random_tokens(rows: int = 2) -> Tensor:
    """``[rows, LENGTH]``."""
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


def run_config(model: ModelConfig, ttt: TTTConfig, *, tp: int, pp: int) -> Config:
    """A run over a converted model."""
    return Config(
        run=RunConfig(name="converted", dir="unused", resume="never"),
        model=model,
        ttt=ttt,
        data=DataConfig(tokenizer=TokenizerConfig(kind=TokenizerKind.bytes), reset_attention=False),
        parallel=ParallelConfig(tp=tp, pp=pp),
        train=TrainConfig(seed=11, seq_length=LENGTH, micro_batch_size=2, global_batch_size=2),
    )


def loaded_model(config: Config, here: Ranks, checkpoint: Path, from_hf: bool) -> Any:
    """This rank's stage with weights from either kind of folder."""
    groups = here.groups
    model = build_model(config, transformer_config(config, device_is_cuda=False), groups)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))  # whatever is not loaded shows
    if from_hf:
        tp = groups.tp
        load_hf_weights(checkpoint, model, config, tp_rank=tp.rank(), tp_size=tp.size())
    else:
        metadata = {**CONTENT, "dp_cp_group": groups.dp_cp}
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        model.load_state_dict(dist_checkpointing.load(wanted, str(checkpoint))["model"])
    return model


def megatron_parameters(
    rank: int, ranks: int, config: Config, checkpoint: Path, from_hf: bool
) -> dict[str, Tensor]:
    """This rank's parameters by their names in the whole model; called through the pool."""
    with megatron_on_cpu(), model_parallel(config) as here, torch.no_grad():
        model = loaded_model(config, here, checkpoint, from_hf)
        return {name: parameter.clone() for name, parameter in global_parameters(model)}


def megatron_logits(
    rank: int, ranks: int, config: Config, checkpoint: Path, from_hf: bool
) -> tuple[int, Tensor] | None:
    """(tensor rank, logits ``[B, T, W/tp]``) on the last stage; called through the pool."""
    with megatron_on_cpu(), model_parallel(config) as here, torch.no_grad():
        model = loaded_model(config, here, checkpoint, from_hf)
        return forward_logits(model, config, here, random_tokens())


def forward_logits(
    model: Any, config: Config, here: Ranks, tokens: Tensor
) -> tuple[int, Tensor] | None:
    """One forward through the pipeline, without Megatron's schedule."""
    chunk_size = config.ttt.chunk_size if ttt_layers(config) else None
    layout = plain_rows(
        batch=len(tokens), length=LENGTH, chunk_size=chunk_size, decay=config.ttt.decay
    )
    pp = here.groups.pp
    if pp.rank() > 0:
        length = LENGTH // (config.parallel.tp if model.config.sequence_parallel else 1)
        received = torch.empty(length, len(tokens), config.model.hidden_size)
        source = dist.get_global_rank(pp, pp.rank() - 1)
        for request in batch_isend_irecv([P2POp(dist.irecv, received, source, pp)]):
            request.wait()
        model.set_input_tensor(received)
    output = model(
        input_ids=tokens,
        position_ids=layout.positions,
        attention_mask=None,
        packed_seq_params=layout,
    )
    if here.is_last_stage:
        return here.groups.tp.rank(), output
    target = dist.get_global_rank(pp, pp.rank() + 1)
    for request in batch_isend_irecv([P2POp(dist.isend, output.contiguous(), target, pp)]):
        request.wait()
    return None


def whole_logits(reports: list[tuple[int, Tensor] | None]) -> Tensor:
    """``[B, T, W]`` from the shards of the tensor ranks, without rows that pad the vocabulary."""
    shards = dict(report for report in reports if report is not None)
    return torch.cat([shards[rank] for rank in sorted(shards)], dim=-1)[..., :VOCABULARY]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to ``max(1, max|expected|)``."""
    scale = max(1.0, expected.abs().max().item())
    return (actual - expected).abs().max().item() / scale
