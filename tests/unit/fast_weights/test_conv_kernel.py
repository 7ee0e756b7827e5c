"""The convolution's Triton kernels: by Triton's interpreter, and compiled for GPUs.

Each in a process of its own: triton asks whether it interprets when it is first imported, which
torch may have done here already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("conv_kernel_cases.py")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: torch brings it with CUDA, as pinned for Python 3.12",
)


def test_the_interpreted_kernels_equal_the_plain_form() -> None:
    """Outputs and gradients: documents, padding, both memory orders, every dtype, infinities."""
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "15 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_gpu(kind: str, capability: int) -> None:
    """To machine code of a device that is not here, in a process without the interpreter."""
    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_ttt.fast_weights import conv_kernel as k
import triton.language as tl
sizes = dict(taps=5, wide=tl.float32, TOKENS=64, CHANNELS=64)
cases = [
    (k._sum_kernel, ["tokens", "weight", "out"], dict(direction=1, **sizes)),
    (k._product_kernel, ["left", "right"], sizes),
]
for kernel, tensors, constants in cases:
    types = {{name: "i32" for name in kernel.arg_names}}
    types |= {{name: "*{kind}" for name in tensors}}
    types |= {{name: "*i64" for name in types if name == "segments"}}
    types |= {{name: "*fp32" for name in types if name == "parts"}}
    types |= {{name: "constexpr" for name in constants}}
    source = ASTSource(kernel, types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", {capability}, 32))
    assert made.asm["ptx"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", script]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
