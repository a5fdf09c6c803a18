"""Calls of the fused ops: everything of a decoder layer that is no product of matrices.

All take bfloat16 tensors on the CPU; `fits` tells whether the library takes these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import Library

LANES = 16
HEAD_DIM_MULTIPLE = 32
MAX_HEAD_DIM = 512


def fits(x: Tensor, size: int, multiple: int = LANES) -> bool:
    """Whether x is a bfloat16 tensor on the CPU that needs no gradient, and size a multiple of the vector length."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and size % multiple == 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def fits_heads(x: Tensor, keys: Tensor) -> bool:
    """Whether x and a cache [H_kv, capacity, D] like its keys fit."""
    head_dim = keys.shape[2]
    return fits(x, head_dim, HEAD_DIM_MULTIPLE) and head_dim <= MAX_HEAD_DIM and keys[0].is_contiguous()


def rms_norm(library: Library, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    library.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        None,
        None,
        x.numel() // size,
        size,
        eps,
        torch.get_num_threads(),
    )
    return out


def rms_norm_quantize(library: Library, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, size = x.shape
    values, scales = torch.empty((rows, size), dtype=torch.int8), torch.empty((rows, 1), dtype=torch.float32)
    library.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        None,
        values.data_ptr(),
        scales.data_ptr(),
        rows,
        size,
        eps,
        torch.get_num_threads(),
    )
    return values, scales


def silu_mul(library: Library, gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=torch.bfloat16)
    library.silu_mul(gate_up.data_ptr(), out.data_ptr(), None, None, rows, size, torch.get_num_threads())
    return out


def silu_mul_quantize(library: Library, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    values, scales = torch.empty((rows, size), dtype=torch.int8), torch.empty((rows, 1), dtype=torch.float32)
    library.silu_mul(
        gate_up.data_ptr(), None, values.data_ptr(), scales.data_ptr(), rows, size, torch.get_num_threads()
    )
    return values, scales


def rotary_write(
    library: Library,
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    start: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    qkv = qkv.contiguous()
    cosines, sines = rotation
    rows = len(qkv)
    kv_heads, capacity, head_dim = keys.shape
    if start + rows > capacity:
        raise ValueError(f"rows {start} to {start + rows} do not fit into a cache of {capacity} slots")
    offset = start * head_dim * keys.itemsize
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty((rows, heads, head_dim), dtype=torch.bfloat16)
    q_weight, k_weight = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    library.rotary_write(
        qkv.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        q_weight,
        k_weight,
        q.data_ptr(),
        keys.data_ptr() + offset,
        values.data_ptr() + offset,
        rows,
        heads,
        kv_heads,
        head_dim,
        keys.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return q


def attend(library: Library, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    q, visible = q.contiguous(), visible.contiguous()
    rows, heads, head_dim = q.shape
    kv_heads, slots = len(keys), visible.shape[1]
    if slots > keys.shape[1] or len(visible) != rows:
        raise ValueError(f"mask {list(visible.shape)} does not fit {rows} rows and {keys.shape[1]} slots")
    out = torch.empty((rows, heads * head_dim), dtype=torch.bfloat16)
    library.attention(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        visible.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        slots,
        keys.stride(0),
        torch.get_num_threads(),
    )
    return out
