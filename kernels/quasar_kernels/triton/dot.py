"""Matmuls inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, accumulator, WIDE: tl.constexpr):
    """Compute ``a @ b + accumulator`` with float32 sums. WIDE: multiply in float32; the interpreter has no bfloat16."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")
