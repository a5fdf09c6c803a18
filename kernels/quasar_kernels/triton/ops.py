"""The ops on CUDA tensors: one call per op, the tiling chosen by shape.

Products take at most `MAX_ROWS` rows, and a K that can be read 16 bytes at a time; `supports` says whether a call
fits, and `quasar_kernels.ops` computes the others with PyTorch's own operations.
"""

from __future__ import annotations

import functools
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quasar_kernels.triton import linear_bf16 as dense
from quasar_kernels.triton import linear_w4 as int4
from quasar_kernels.triton import linear_w8a8 as int8
from quasar_kernels.triton.activation import silu_mul, silu_mul_quantize
from quasar_kernels.triton.attention import block_attention
from quasar_kernels.triton.int4_packing import W4A8_GROUP_SIZES, W4A16_GROUP_SIZES, PackedInt4, pack_int4
from quasar_kernels.triton.norm import add_rms_norm, add_rms_norm_quantize
from quasar_kernels.triton.quantize import quantize_tokens, quantizes
from quasar_kernels.triton.rotary import rotary_write_at
from quasar_kernels.triton.tuning import MAX_ROWS, Shape, Tiling, tiling_for

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantize",
    "block_attention",
    "capable",
    "linear_bf16",
    "linear_w4a8",
    "linear_w4a8_quantized",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a8_quantized",
    "linear_w8a16",
    "packed_int4",
    "quantize_tokens",
    "quantizes",
    "rotary_write_at",
    "silu_mul",
    "silu_mul_quantize",
    "supports",
]

# Reads of 16 bytes must not cross the end of a row.
INPUTS_MULTIPLE = 16
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.int8)
_GROUP_SIZES = {"linear_w4a16": W4A16_GROUP_SIZES, "linear_w4a8": W4A8_GROUP_SIZES}
_packed_weights: WeakKeyDictionary[object, PackedInt4] = WeakKeyDictionary()


def supports(op: str, x: Tensor, group_size: int = 0) -> bool:
    """Whether ``op`` has a kernel for activations x [M, K] of this shape and dtype (int8 if quantized already).

    Float32 is the mode in which results are compared exactly; it is left to PyTorch.
    """
    return (
        x.is_cuda
        and x.dtype in ACTIVATION_DTYPES
        and len(x) <= MAX_ROWS
        and x.shape[1] % INPUTS_MULTIPLE == 0
        and (op not in _GROUP_SIZES or group_size in _GROUP_SIZES[op])
    )


def linear_w8a8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_w8a8`."""
    tokens, token_scales = quantize_tokens(x.contiguous())
    return linear_w8a8_quantized(tokens, token_scales, values, scales, bias, x.dtype)


def linear_w8a8_quantized(
    tokens: Tensor, token_scales: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_w8a8` of activations that are quantized already: int8 [M, K] and float32 [M, 1]."""
    tiling = tiling_for(Shape("linear_w8a8", len(tokens), *values.shape), tokens.device)
    return int8.linear_w8a8(tokens, token_scales, values, scales, bias, dtype, tiling)


def linear_w8a16(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_w8a16`."""
    tiling = tiling_for(Shape("linear_w8a16", len(x), *values.shape), x.device)
    return dense.linear_w8a16(x.contiguous(), values, scales, bias, tiling)


def linear_w4a16(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_w4a16`."""
    return int4.linear_w4a16(x.contiguous(), weight, bias, _int4_tiling("linear_w4a16", x, weight))


def linear_w4a8(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_w4a8`."""
    tokens, token_scales = quantize_tokens(x.contiguous(), weight.group_size)
    return linear_w4a8_quantized(tokens, token_scales, weight, bias, x.dtype)


def linear_w4a8_quantized(
    tokens: Tensor, token_scales: Tensor, weight: PackedInt4, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_w4a8` of activations that are quantized already: int8 [M, K] and float32 [M, K / group_size]."""
    return int4.linear_w4a8(tokens, token_scales, weight, bias, dtype, _int4_tiling("linear_w4a8", tokens, weight))


def linear_bf16(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with unquantized weights [N, K] in the dtype of x."""
    tiling = tiling_for(Shape("linear_bf16", len(x), *values.shape), x.device)
    return dense.linear_bf16(x.contiguous(), values, bias, tiling)


def packed_int4(owner: object, packed: Tensor, scales: Tensor, zeros: Tensor) -> PackedInt4:
    """A weight in the kernels' form, made on first use and kept as long as its owner lives."""
    if owner not in _packed_weights:
        _packed_weights[owner] = pack_int4(packed, scales, zeros)
    return _packed_weights[owner]


def _int4_tiling(op: str, x: Tensor, weight: PackedInt4) -> Tiling:
    return tiling_for(Shape(op, len(x), weight.outputs, weight.inputs, weight.group_size), x.device)


@functools.cache
def capable(device: torch.device) -> bool:
    """Whether the GPU has asynchronous copies and bfloat16 tensor cores: compute capability 8.0 and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
