"""Rotary frequencies: plain, LLaMA-3 scaling, YaRN, with every parameter of a ``config.json``.

Megatron's own tables fix some of these parameters (LLaMA-3's original length, YaRN's truncation),
so imported checkpoints could silently differ; here they are what the checkpoint says.
"""

import math

import torch
from torch import Tensor

from megatron_ttt.config.schema import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """``theta_i = base^(-2i/d)``, scaled as ``rope.scaling`` says: ``[head_dim / 2]`` fp32.

    Sources: RoPE (arXiv 2104.09864); LLaMA 3.1's released inference code; YaRN (arXiv 2309.00071,
    section 3.2), with the ramp's bounds rounded outwards as ``transformers`` does.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.base**exponents)
    if rope.scaling is RopeScaling.none:
        return plain
    if rope.scaling is RopeScaling.llama3:
        return _llama3(plain, rope)
    return _yarn(plain, rope, head_dim)


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    wavelengths = 2 * math.pi / plain
    low_bound = rope.original_max_positions / rope.low_freq_factor
    high_bound = rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(wavelengths > low_bound, plain / rope.factor, between)
    return torch.where(wavelengths < high_bound, plain, scaled)


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """Return the dimension that turns ``rotations`` times over the original length."""
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.base))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return plain / rope.factor * (1 - keep) + plain * keep
