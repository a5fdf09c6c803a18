"""The ops around the products of a verification pass: compiled on a CPU, Triton kernels on CUDA, else the reference.

Signatures and meaning are those of `reference`. The position in the cache is read when a kernel runs, so that a
captured CUDA graph or a recorded `cpu.Tape` serves every context length. In the two that give int8, rows are quantized
as `reference.quantize_tokens` does, in groups where a size is given.

Kernels serve passes without gradients. With gradients, under ``torch.compile``, and on a GPU in float32, the mode in
which results are compared exactly, PyTorch's operations compute the same.
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
    if cpu.fits(x, x.shape[-1]) and weight.dtype == x.dtype and (library := backend()) is not None:
        return cpu.rms_norm(library, x, weight, eps, residual)
    return (_gpu_for(x) or reference).add_rms_norm(x, weight, eps, residual)


def add_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows as int8 and their scales, and the sum that was normalized."""
    same = weight.dtype == x.dtype
    if same and cpu.fits(x, group_size or x.shape[-1]) and (library := backend()) is not None:
        return cpu.rms_norm_quantize(library, x, weight, eps, residual, group_size)
    return _quantizing_backend(x, group_size).add_rms_norm_quantize(x, weight, eps, residual, group_size)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    if cpu.fits(gate_up, gate_up.shape[1] // 2) and (library := backend()) is not None:
        return cpu.silu_mul(library, gate_up)
    return (_gpu_for(gate_up) or reference).silu_mul(gate_up)


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
    same = q_norm is None or q_norm.dtype == qkv.dtype
    if same and cpu.fits_heads(qkv, keys) and (library := backend()) is not None:
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        return cpu.rotary_write(library, qkv, (cos, sin), keys, values, start, norms, eps)
    return (_gpu_for(qkv) or reference).rotary_write_at(qkv, cos, sin, keys, values, start, q_norm, k_norm, eps)


def block_attention(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """Attention of a block over the cached context and itself."""
    if cpu.fits_heads(q, keys) and block_mask.dtype == torch.bool and (library := backend()) is not None:
        return cpu.attend(library, q, keys, values, block_mask, start)
    gpu = _gpu_for(q)
    if gpu is not None and len(q) <= gpu.MAX_ROWS:
        return gpu.block_attention(q, keys, values, start, block_mask)
    return _attention_by_torch(q, keys, values, start, block_mask)


def linear_dense(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` with unquantized weights [N, K] in the dtype of x. x: [M, K]; returns [M, N]."""
    gpu = _gpu_for(x)
    if gpu is not None and gpu.supports("linear_bf16", x):
        return gpu.linear_bf16(x, values, bias)
    return F.linear(x, values, bias)


def _attention_by_torch(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """`block_attention` by PyTorch's operations, for blocks of any size; gradients pass through it.

    It does not wait for the device, so it reads every slot of ``keys``: a caller that knows where the block ends gives
    it no more. The H / H_kv query heads of a KV head are packed into rows, so that each key is read once.
    """
    rows, heads, head_dim = q.shape
    group = heads // len(keys)
    place = torch.arange(keys.shape[1], device=q.device) - start
    in_block = (place >= 0) & (place < rows)
    visible = (place < 0) | (in_block & block_mask.bool()[:, place.clamp(0, rows - 1)])
    packed = q.transpose(0, 1).reshape(1, len(keys), group * rows, head_dim)
    if q.dtype == torch.float32 and rows <= reference.EXACT_BLOCK:
        packed, keys, values = packed.double(), keys.double(), values.double()
    out = F.scaled_dot_product_attention(
        packed, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=visible.repeat(group, 1)
    )
    return out.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim).to(q.dtype)


def _gpu_for(x: Tensor) -> ModuleType | None:
    """The Triton kernels, where there are some for x."""
    if x.dtype == torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return gpu_backend(x)


def _quantizing_backend(x: Tensor, group_size: int | None) -> ModuleType:
    gpu = _gpu_for(x)
    return gpu if gpu is not None and gpu.quantizes(group_size) else reference
