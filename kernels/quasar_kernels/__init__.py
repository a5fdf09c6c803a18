"""Low-bit skinny matmuls for verification passes of 1 to 64 tokens, and the ops between them.

This package works on tensors only and knows nothing of configs, models or decoding. `quasar_kernels.ops` describes
every op; the functions exported here choose the backend that the tensors' device offers.
"""

from quasar_kernels.attention_options import AttentionOptions
from quasar_kernels.group_numbers import GroupNumbers
from quasar_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_quantize
from quasar_kernels.ops.add_scaled import add_scaled
from quasar_kernels.ops.block_attention import block_attention
from quasar_kernels.ops.first_maxima import first_maxima
from quasar_kernels.ops.gelu_mul import gelu_mul, gelu_mul_quantize
from quasar_kernels.ops.linear_bf16 import linear_bf16, linear_dense
from quasar_kernels.ops.linear_fp8 import linear_fp8
from quasar_kernels.ops.linear_w4a8 import linear_w4a8
from quasar_kernels.ops.linear_w4a16 import linear_w4a16
from quasar_kernels.ops.linear_w8a8 import linear_w8a8
from quasar_kernels.ops.linear_w8a16 import linear_w8a16
from quasar_kernels.ops.rotary_write import rotary_write
from quasar_kernels.ops.select_inputs import select_inputs
from quasar_kernels.ops.silu_mul import silu_mul, silu_mul_quantize
from quasar_kernels.slots import QuantizedSlots, Slots
from quasar_kernels.weights import (
    DenseWeight,
    Fp8Weight,
    GroupInt8Weight,
    InputOrder,
    Int4Weight,
    Int8Weight,
    Quantized,
)

__all__ = [
    "AttentionOptions",
    "DenseWeight",
    "Fp8Weight",
    "GroupInt8Weight",
    "GroupNumbers",
    "InputOrder",
    "Int4Weight",
    "Int8Weight",
    "Quantized",
    "QuantizedSlots",
    "Slots",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "add_scaled",
    "block_attention",
    "first_maxima",
    "gelu_mul",
    "gelu_mul_quantize",
    "linear_bf16",
    "linear_dense",
    "linear_fp8",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "rotary_write",
    "select_inputs",
    "silu_mul",
    "silu_mul_quantize",
]
