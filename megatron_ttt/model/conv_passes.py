"""Which form of the target's convolution runs where."""

import importlib.util
from functools import cache

from torch import Tensor

from megatron_ttt.fast_weights.target import PLAIN, ConvPasses


def conv_passes(tokens: Tensor) -> ConvPasses:
    """Return Triton's single pass for a GPU, where triton is installed, else the plain form."""
    return _fused() if tokens.is_cuda and importlib.util.find_spec("triton") else PLAIN


@cache
def _fused() -> ConvPasses:
    from megatron_ttt.fast_weights import conv_kernel

    return ConvPasses(conv_kernel.sum_of_neighbours, conv_kernel.products_with_neighbours)
