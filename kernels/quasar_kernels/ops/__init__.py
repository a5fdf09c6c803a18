"""The table of all ops. The file of an op contains its signature, its definition, its kernels, and its case.

The benchmark, the GPU suite and the tests go through this table.
"""

from quasar_kernels.ops import (
    add_rms_norm,
    add_scaled,
    block_attention,
    first_maxima,
    gelu_mul,
    linear_bf16,
    linear_fp8,
    linear_w4a8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
    rotary_write,
    select_inputs,
    silu_mul,
)

MATMULS = (linear_w8a8.OP, linear_w4a16.OP, linear_bf16.OP, linear_w4a8.OP, linear_w8a16.OP, linear_fp8.OP)
"""The matmuls, the most important first, because the GPU suite may run out of time."""
LAYER_OPS = (
    add_rms_norm.OP,
    add_rms_norm.QUANTIZING,
    silu_mul.OP,
    silu_mul.QUANTIZING,
    gelu_mul.OP,
    gelu_mul.QUANTIZING,
    add_scaled.OP,
    rotary_write.OP,
    rotary_write.KV8,
    rotary_write.KV4,
    block_attention.OP,
    block_attention.KV8,
    block_attention.KV4,
    first_maxima.OP,
    select_inputs.OP,
)
"""The ops between the matmuls. Each has a case to measure."""
