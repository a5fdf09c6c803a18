"""The products as models call them: one signature per op, the backend chosen by device, shape and machine.

On a CPU with AVX2 or better the compiled kernels of `cpu` do the work, on CUDA those of `triton` where they have one
for the shape; elsewhere PyTorch's own operations compute what `reference` defines. Activations of the int8 products
are quantized inside, or passed as `Quantized` by an op that did so already.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import reference
from quasar_kernels.cpu import backend, custom_ops
from quasar_kernels.cpu.library import ACTIVATION_DTYPES, Library, multiply
from quasar_kernels.gpu import gpu_backend, packed_for_gpu
from quasar_kernels.weights import DenseWeight, Int4Weight, Int8Weight, Quantized

# PyTorch's packed 4-bit product re-reads the weights every few rows: beyond this many, dequantizing once is cheaper.
PACKED_INT4_MAX_ROWS = 64
CUDA_INT_MM_MIN_ROWS = 17


def linear_w8a8(x: Tensor | Quantized, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, int8 × int8 with per-token and per-channel scales. x: [M, K]; returns [M, N]."""
    if gpu := _gpu_for("linear_w8a8", x):
        if isinstance(x, Quantized):
            return gpu.linear_w8a8_quantized(x.values, x.scales, weight.values, weight.scales, bias, x.dtype)
        return gpu.linear_w8a8(x, weight.values, weight.scales, bias)
    library = _library_for(x)
    packed = weight.packed_for_kernels() if library is not None else None
    if library is not None and packed is not None and packed.scales is not None:
        if x.dtype not in ACTIVATION_DTYPES:
            wide = x._replace(dtype=torch.float32) if isinstance(x, Quantized) else x.float()
            return linear_w8a8(wide, weight, _widened(bias)).to(x.dtype)
        if isinstance(x, Quantized):
            return multiply(library.linear_w8a8, packed, x.values, bias, x.scales, x.dtype)
        if torch.compiler.is_compiling():
            return custom_ops.linear_w8a8(x, packed.values, packed.scales, bias)
        return multiply(library.linear_w8a8, packed, x, bias)
    tokens, token_scales = (x.values, x.scales) if isinstance(x, Quantized) else reference.quantize_tokens(x)
    rows = len(tokens)
    if tokens.is_cuda and rows < CUDA_INT_MM_MIN_ROWS:
        tokens = F.pad(tokens, (0, 0, 0, CUDA_INT_MM_MIN_ROWS - rows))
    accumulated = torch._int_mm(tokens, weight.values.T)[:rows]
    out = accumulated.float() * (token_scales * weight.scales)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w8a16(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, int8 weights with per-channel scales, activations as they are. x: [M, K]; returns [M, N].

    The compiled kernels take activations as integers of 15 bit per token, which is finer than bfloat16 is near a
    token's largest value.
    """
    if gpu := _gpu_for("linear_w8a16", x):
        return gpu.linear_w8a16(x, weight.values, weight.scales, bias)
    library = _library_for(x)
    packed = weight.packed_for_kernels() if library is not None else None
    if library is not None and packed is not None and packed.scales is not None:
        if x.dtype not in ACTIVATION_DTYPES:
            return linear_w8a16(x.float(), weight, _widened(bias)).to(x.dtype)
        if torch.compiler.is_compiling():
            return custom_ops.linear_w8a16(x, packed.values, packed.scales, bias)
        return multiply(library.linear_w8a16, packed, x, bias)
    out = F.linear(x, weight.values.to(x.dtype)).float() * weight.scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w4a16(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights. x: [M, K]; returns [M, N]."""
    if gpu := _gpu_for("linear_w4a16", x, weight.group_size):
        return gpu.linear_w4a16(x, packed_for_gpu(weight), bias)
    library = _library_for(x)
    packed = weight.packed_for_kernels() if library is not None else None
    if library is not None and packed is not None and packed.scales is not None:
        if x.dtype not in ACTIVATION_DTYPES:
            return linear_w4a16(x.float(), weight, _widened(bias)).to(x.dtype)
        if torch.compiler.is_compiling():
            return custom_ops.linear_w4a16(x, packed.values, packed.scales, packed.zeros, packed.scale_unit, bias)
        return multiply(library.linear_w4a16, packed, x, bias)
    if x.dtype == torch.bfloat16 and len(x) <= PACKED_INT4_MAX_ROWS and (prepared := weight.packed_for_torch()):
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), prepared[0], weight.group_size, prepared[1])
        return out if bias is None else out + bias
    return F.linear(x, weight.dequantize().to(x.dtype), bias)


def linear_w4a8(x: Tensor | Quantized, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with 4-bit weights and int8 activations, both scaled by group. x: [M, K]; returns [M, N]."""
    if gpu := _gpu_for("linear_w4a8", x, weight.group_size):
        if isinstance(x, Quantized):
            return gpu.linear_w4a8_quantized(x.values, x.scales, packed_for_gpu(weight), bias, x.dtype)
        return gpu.linear_w4a8(x, packed_for_gpu(weight), bias)
    library = _library_for(x)
    packed = weight.packed_for_kernels() if library is not None else None
    if library is not None and packed is not None and packed.scales is not None:
        if x.dtype not in ACTIVATION_DTYPES:
            wide = x._replace(dtype=torch.float32) if isinstance(x, Quantized) else x.float()
            return linear_w4a8(wide, weight, _widened(bias)).to(x.dtype)
        if isinstance(x, Quantized):
            return multiply(library.linear_w4a8, packed, x.values, bias, x.scales, x.dtype)
        if torch.compiler.is_compiling():
            return custom_ops.linear_w4a8(x, packed.values, packed.scales, packed.zeros, packed.scale_unit, bias)
        return multiply(library.linear_w4a8, packed, x, bias)
    if isinstance(x, Quantized):
        out = reference.linear_w4a8_quantized(x.values, x.scales, *weight.canonical(), bias)
        return out.to(x.dtype)
    return reference.linear_w4a8(x, *weight.canonical(), bias)


def linear_bf16(x: Tensor, weight: DenseWeight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with bfloat16 (or, in exactness mode, float32) weights, summed in float32.

    x: [M, K]; returns [M, N].
    """
    if gpu := _gpu_for("linear_bf16", x):
        return gpu.linear_bf16(x, weight.values, bias)
    library = _library_for(x)
    packed = weight.packed_for_kernels() if library is not None else None
    if library is not None and packed is not None and x.dtype in ACTIVATION_DTYPES:
        if torch.compiler.is_compiling():
            return custom_ops.linear_bf16(x, packed.values, bias)
        return multiply(library.linear_f32 if weight.dtype == torch.float32 else library.linear_bf16, packed, x, bias)
    return F.linear(x, weight.values.to(x.dtype), bias)


def _gpu_for(op: str, x: Tensor | Quantized, group_size: int = 0) -> ModuleType | None:
    rows = x.values if isinstance(x, Quantized) else x
    gpu = gpu_backend(rows)
    return gpu if gpu is not None and gpu.supports(op, rows, group_size) else None


def _library_for(x: Tensor | Quantized) -> Library | None:
    """The compiled CPU kernels; for rows on another device they need not even be compiled."""
    rows = x.values if isinstance(x, Quantized) else x
    return backend() if rows.device.type == "cpu" else None


def _widened(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
