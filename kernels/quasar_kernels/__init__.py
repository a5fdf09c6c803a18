"""Low-bit skinny matrix products for verification passes of 1 to 64 tokens.

This package knows tensors only: nothing of configs, models or decoding. `quasar_kernels.reference` defines every op
in plain PyTorch and is the oracle of all tests; the functions exported here choose the fastest backend that
the tensors' device has.
"""

from quasar_kernels.fused import (
    attend,
    first_maxima,
    rms_norm,
    rms_norm_quantize,
    rotary_write,
    silu_mul,
    silu_mul_quantize,
)
from quasar_kernels.ops import linear_bf16, linear_w4a8, linear_w4a16, linear_w8a8, linear_w8a16
from quasar_kernels.weights import DenseWeight, Int4Weight, Int8Weight, Quantized

__all__ = [
    "DenseWeight",
    "Int4Weight",
    "Int8Weight",
    "Quantized",
    "attend",
    "first_maxima",
    "linear_bf16",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "rms_norm",
    "rms_norm_quantize",
    "rotary_write",
    "silu_mul",
    "silu_mul_quantize",
]
