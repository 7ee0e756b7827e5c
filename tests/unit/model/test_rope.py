"""Rotary frequencies against ``transformers``, parameter by parameter."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ttt.config.derived import attention_factor
from megatron_ttt.config.schema import RopeConfig, RopeScaling
from megatron_ttt.model.rope import inverse_frequencies

LLAMA_31: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def theirs(kind: str, parameters: dict[str, Any], base: float) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"factor": 32.0}, {"original_max_position_embeddings": 4096, "low_freq_factor": 2.0}],
    ids=["LLaMA 3.1", "LLaMA 3.2", "other lengths"],
)
def test_llama3_scaling(changes: dict[str, Any]) -> None:
    parameters = {**LLAMA_31, **changes}
    rope = RopeConfig(
        base=500000.0,
        scaling=RopeScaling.llama3,
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        original_max_positions=parameters["original_max_position_embeddings"],
    )
    expected, factor = theirs("llama3", parameters, rope.base)
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-6, atol=0)
    assert attention_factor(rope) == factor == 1.0
    plain = inverse_frequencies(RopeConfig(base=rope.base), 64)
    assert (expected < 0.5 * plain).any() and (expected == plain).any()


@pytest.mark.parametrize(("factor", "original"), [(4.0, 32768), (2.0, 40960), (16.0, 2048)])
def test_yarn(factor: float, original: int) -> None:
    parameters = {"factor": factor, "original_max_position_embeddings": original}
    rope = RopeConfig(
        base=1e6, scaling=RopeScaling.yarn, factor=factor, original_max_positions=original
    )
    expected, theirs_factor = theirs("yarn", parameters, rope.base)
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-5, atol=0)
    assert attention_factor(rope) == pytest.approx(theirs_factor, rel=1e-6)


def test_no_scaling() -> None:
    expected = 1.0 / 1e4 ** (torch.arange(0, 64, 2).float() / 64)
    torch.testing.assert_close(inverse_frequencies(RopeConfig(), 64), expected)
