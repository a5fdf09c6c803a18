"""Calls of the fused ops: everything of a decoder layer that is no product of matrices.

All take bfloat16 tensors on the CPU; `fits` and `fits_heads` tell whether the library takes these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quasar_kernels.cpu.library import Library

LANES = 16
HEAD_DIM_MULTIPLE = 32
MAX_HEAD_DIM = 512


def fits(x: Tensor, size: int, multiple: int = LANES) -> bool:
    """Whether x is a bfloat16 tensor on the CPU that needs no gradient, and size a multiple of the vector length."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and size % multiple == 0 and not torch.is_grad_enabled()


def fits_heads(x: Tensor, keys: Tensor) -> bool:
    """Whether x and a cache [H_kv, capacity, D] like its keys fit."""
    head_dim = keys.shape[2]
    fitting_cache = head_dim <= MAX_HEAD_DIM and keys.stride()[1:] == (head_dim, 1) and keys.dtype == x.dtype
    return fitting_cache and fits(x, head_dim, HEAD_DIM_MULTIPLE)


def rms_norm(
    library: Library, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The normalized rows of ``x + residual``, and that sum."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    return out, _rms_norm(library, x, weight, eps, residual, out.data_ptr())


def rms_norm_quantize(
    library: Library,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows of ``x + residual`` [M, K], as int8 and their scales [M, K / group_size], and that sum."""
    x = x.contiguous()
    values, scales = _quantized(len(x), x.shape[1], group_size)
    return values, scales, _rms_norm(library, x, weight, eps, residual, None, (values, scales))


def silu_mul(library: Library, gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=torch.bfloat16)
    library.silu_mul(gate_up.data_ptr(), out.data_ptr(), None, None, rows, size, size, torch.get_num_threads())
    return out


def silu_mul_quantize(library: Library, gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    values, scales = _quantized(rows, size, group_size)
    group = size // scales.shape[1]
    library.silu_mul(
        gate_up.data_ptr(), None, values.data_ptr(), scales.data_ptr(), rows, size, group, torch.get_num_threads()
    )
    return values, scales


def first_maxima(library: Library, x: Tensor) -> Tensor:
    """int64 [M], for x [M, S]."""
    x = x.contiguous()
    indices = torch.empty(len(x), dtype=torch.int64)
    library.first_maxima(x.data_ptr(), indices.data_ptr(), *x.shape, torch.get_num_threads())
    return indices


def rotary_write(
    library: Library,
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    start: int | Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """start: the first slot, or int64 [1] that holds it when the kernel runs; then the caller sees to it that the rows
    fit into the cache. Raises ValueError where they do not."""
    qkv = qkv.contiguous()
    cosines, sines = rotation
    rows = len(qkv)
    kv_heads, capacity, head_dim = keys.shape
    offset, start_pointer = 0, None
    if isinstance(start, Tensor):
        start_pointer = start.data_ptr()
    elif start + rows > capacity:
        raise ValueError(f"rows {start} to {start + rows} do not fit into a cache of {capacity} slots")
    else:
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
        start_pointer,
        rows,
        heads,
        kv_heads,
        head_dim,
        keys.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return q


def attend(
    library: Library, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, start: Tensor | None = None
) -> Tensor:
    """mask: bool [R, S] over the first S slots; with ``start``, int64 [1], bool [R, R] over the slots from there on,
    and every row sees those before. Raises ValueError for a mask of another shape."""
    q, mask = q.contiguous(), mask.contiguous()
    rows, heads, head_dim = q.shape
    kv_heads, slots = len(keys), mask.shape[1]
    if len(mask) != rows or slots > (keys.shape[1] if start is None else rows):
        raise ValueError(f"mask {list(mask.shape)} does not fit {rows} rows and {keys.shape[1]} slots")
    out = torch.empty((rows, heads * head_dim), dtype=torch.bfloat16)
    library.attention(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        mask.data_ptr(),
        out.data_ptr(),
        None if start is None else start.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        slots,
        keys.stride(0),
        torch.get_num_threads(),
    )
    return out


def _quantized(rows: int, size: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Room for int8 values [rows, size] and their scales."""
    groups = size // (group_size or size)
    return torch.empty((rows, size), dtype=torch.int8), torch.empty((rows, groups), dtype=torch.float32)


def _rms_norm(
    library: Library,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    out: int | None,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalize into ``out``, or into ``quantized`` values and scales; returns the sum that was normalized."""
    total, total_pointer, residual_pointer = x, None, None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty(x.shape, dtype=x.dtype)
        total_pointer, residual_pointer = total.data_ptr(), residual.data_ptr()
    size = x.shape[-1]
    values, scales = (None, None) if quantized is None else (quantized[0].data_ptr(), quantized[1].data_ptr())
    group = size if quantized is None else size // quantized[1].shape[1]
    library.rms_norm(
        x.data_ptr(),
        residual_pointer,
        weight.data_ptr(),
        total_pointer,
        out,
        values,
        scales,
        x.numel() // size,
        size,
        group,
        eps,
        torch.get_num_threads(),
    )
    return total
