"""The ops around the products of a verification pass: compiled on a CPU, Triton kernels on CUDA, else the reference.

Signatures and meaning are those of `reference`. The position in the cache is read when a kernel runs, so that a
captured CUDA graph or a recorded `cpu.Tape` serves every context length. In the two that give int8, rows are quantized
as `reference.quantize_tokens` does, in groups where a size is given.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import reference
from quasar_kernels.cpu import backend
from quasar_kernels.cpu import fused as cpu
from quasar_kernels.gpu import gpu_backend


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normalized rows and the sum that was normalized."""
    if cpu.fits(x, x.shape[-1]) and (library := backend()) is not None:
        return cpu.rms_norm(library, x, weight, eps, residual)
    return (gpu_backend(x) or reference).add_rms_norm(x, weight, eps, residual)


def add_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows as int8 and their scales, and the sum that was normalized."""
    if cpu.fits(x, group_size or x.shape[-1]) and (library := backend()) is not None:
        return cpu.rms_norm_quantize(library, x, weight, eps, residual, group_size)
    return _quantizing_backend(x, group_size).add_rms_norm_quantize(x, weight, eps, residual, group_size)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    if cpu.fits(gate_up, gate_up.shape[1] // 2) and (library := backend()) is not None:
        return cpu.silu_mul(library, gate_up)
    return (gpu_backend(gate_up) or reference).silu_mul(gate_up)


def silu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up`` as int8 and its scales."""
    if cpu.fits(gate_up, group_size or gate_up.shape[1] // 2) and (library := backend()) is not None:
        return cpu.silu_mul_quantize(library, gate_up, group_size)
    return _quantizing_backend(gate_up, group_size).silu_mul_quantize(gate_up, group_size)


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
    if cpu.fits_heads(qkv, keys) and (library := backend()) is not None:
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        return cpu.rotary_write(library, qkv, (cos, sin), keys, values, start, norms, eps)
    gpu = gpu_backend(qkv)
    return (gpu or reference).rotary_write_at(qkv, cos, sin, keys, values, start, q_norm, k_norm, eps)


def block_attention(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """Attention of a block over the cached context and itself."""
    if cpu.fits_heads(q, keys) and block_mask.dtype == torch.bool and (library := backend()) is not None:
        return cpu.attend(library, q, keys, values, block_mask, start)
    return (gpu_backend(q) or reference).block_attention(q, keys, values, start, block_mask)


def linear_dense(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` with unquantized weights [N, K] in the dtype of x. x: [M, K]; returns [M, N]."""
    gpu = gpu_backend(x)
    if gpu is not None and gpu.supports("linear_bf16", x):
        return gpu.linear_bf16(x, values, bias)
    return F.linear(x, values, bias)


def _quantizing_backend(x: Tensor, group_size: int | None) -> ModuleType:
    gpu = gpu_backend(x)
    return gpu if gpu is not None and gpu.quantizes(group_size) else reference
