"""The ops that the forward of a model calls besides its layers' matmuls."""

from quasar_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_quantize
from quasar_kernels.ops.block_attention import block_attention
from quasar_kernels.ops.linear_bf16 import linear_dense
from quasar_kernels.ops.rotary_write import rotary_write_at
from quasar_kernels.ops.silu_mul import silu_mul, silu_mul_quantize

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantize",
    "block_attention",
    "linear_dense",
    "rotary_write_at",
    "silu_mul",
    "silu_mul_quantize",
]
