"""The ops around the products of a verification pass: Triton kernels on CUDA, the reference elsewhere.

Signatures and meaning are those of `kernels.reference`. Positions in the cache are read on the device, so that a
captured CUDA graph serves every context length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.gpu import gpu_backend, packed_for_gpu
from kernels.weights import Int4Weight, Int8Weight


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normalized rows and the sum that was normalized."""
    gpu = gpu_backend(x)
    return (gpu or reference).add_rms_norm(x, weight, eps, residual)


def add_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows as int8 and their scales, and the sum that was normalized."""
    gpu = gpu_backend(x)
    return (gpu or reference).add_rms_norm_quantize(x, weight, eps, residual)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return (gpu_backend(gate_up) or reference).silu_mul(gate_up)


def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up`` as int8 and its scales."""
    return (gpu_backend(gate_up) or reference).silu_mul_quantize(gate_up)


def rotary_write_at(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The rotated queries; keys and values go to the cache."""
    return (gpu_backend(qkv) or reference).rotary_write_at(qkv, cos, sin, keys, values, start, q_norm, k_norm, eps)


def block_attention(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """Attention of a block over the cached context and itself."""
    return (gpu_backend(q) or reference).block_attention(q, keys, values, start, block_mask)


def linear_dense(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` with unquantized weights [N, K] in the dtype of x. x: [M, K]; returns [M, N]."""
    gpu = gpu_backend(x)
    if gpu is not None and gpu.supports("linear_bf16", x):
        return gpu.linear_bf16(x, values, bias)
    return F.linear(x, values, bias)


def linear_w8a8_quantized(
    tokens: Tensor, token_scales: Tensor, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`kernels.linear_w8a8` of activations that are quantized already: int8 [M, K] and float32 [M, 1]."""
    gpu = gpu_backend(tokens)
    if gpu is not None and gpu.supports("linear_w8a8", tokens):
        return gpu.linear_w8a8_quantized(tokens, token_scales, weight.values, weight.scales, bias, dtype)
    return reference.linear_w8a8_quantized(tokens, token_scales, weight.values, weight.scales, bias).to(dtype)


def linear_w4a8_quantized(
    tokens: Tensor, token_scales: Tensor, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`kernels.linear_w4a8` of activations that are quantized already: int8 [M, K] and float32 [M, 1]."""
    gpu = gpu_backend(tokens)
    if gpu is not None and gpu.supports("linear_w4a8", tokens, weight.group_size):
        return gpu.linear_w4a8_quantized(tokens, token_scales, packed_for_gpu(weight), bias, dtype)
    return reference.linear_w4a8_quantized(tokens, token_scales, *weight.canonical(), bias).to(dtype)
