"""Calls of the library's functions on tensors.

The ops between the matmuls take bfloat16 tensors on the CPU. `fits` and `fits_heads` return whether the library takes
given tensors; the other functions do not check this again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quasar_kernels.attention_options import PLAIN_ATTENTION, AttentionOptions
from quasar_kernels.cpu.library import (
    ACTIVATION_DTYPES,
    ACTIVATIONS_BFLOAT16,
    ACTIVATIONS_INT8,
    BIAS_BFLOAT16,
    Library,
    MatmulFunction,
)
from quasar_kernels.cpu.packing import PackedWeight
from quasar_kernels.slots import QuantizedSlots, Slots

if TYPE_CHECKING:
    from quasar_kernels.weights import InputOrder

LANES = 16
HEAD_DIM_MULTIPLE = 32
MAX_HEAD_DIM = 512


def fits(x: Tensor, size: int, multiple: int = LANES) -> bool:
    """Return whether x is bfloat16 and ``size`` a multiple of ``multiple``."""
    return x.dtype == torch.bfloat16 and size % multiple == 0


def fits_heads(x: Tensor, keys: Slots) -> bool:
    """Return whether the library takes x with a cache [H_kv, capacity, D] whose keys are ``keys``."""
    head_dim = keys.shape[2]
    if isinstance(keys, Tensor) and (keys.stride()[1:] != (head_dim, 1) or keys.dtype != x.dtype):
        return False
    return head_dim <= MAX_HEAD_DIM and fits(x, head_dim, HEAD_DIM_MULTIPLE)


def multiply(
    function: MatmulFunction,
    weight: PackedWeight,
    x: Tensor,
    bias: Tensor | None,
    token_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``x W^T + bias`` with one of the library's matmuls.

    x: bfloat16 or float32 [M, K] on the CPU, or int8 with float32 ``token_scales`` [M, G] (one for int8 weights, else
    one for each of the weight's groups) and the ``dtype`` of the result; bias: bfloat16 or float32 [N].
    Returns [M, N] in the dtype of x.
    Raises ValueError for other shapes, dtypes or devices, because the library itself checks nothing.
    """
    if dtype is None:
        dtype = x.dtype
    flags = ACTIVATIONS_BFLOAT16 if dtype == torch.bfloat16 else 0
    scales_pointer = bias_pointer = None
    valid = x.dim() == 2 and x.shape[1] == weight.inputs and dtype in ACTIVATION_DTYPES and x.device.type == "cpu"
    if token_scales is not None:
        token_scales = token_scales.contiguous()
        scales_pointer = token_scales.data_ptr()
        flags |= ACTIVATIONS_INT8
        groups = weight.inputs // (weight.group_size or weight.inputs)
        valid = valid and x.dtype == torch.int8 and token_scales.dtype == torch.float32
        valid = valid and token_scales.shape == (len(x), groups)
    if not valid:
        raise ValueError(
            f"expected bfloat16, float32 or scaled int8 [M, {weight.inputs}] on the CPU, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None:
        if bias.shape != (weight.outputs,) or bias.dtype not in ACTIVATION_DTYPES or bias.device.type != "cpu":
            raise ValueError(
                f"expected a bias [{weight.outputs}] in bfloat16 or float32 on the CPU, got {bias.dtype} "
                f"{list(bias.shape)} on {bias.device}"
            )
        bias = bias.contiguous()
        bias_pointer = bias.data_ptr()
        if bias.dtype == torch.bfloat16:
            flags |= BIAS_BFLOAT16
    rows = x.shape[0]
    out = torch.empty((rows, weight.outputs), dtype=dtype)
    function(
        weight.address, x.data_ptr(), scales_pointer, out.data_ptr(), bias_pointer, rows, flags, torch.get_num_threads()
    )
    return out


def rms_norm(
    library: Library, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the normalized rows of ``x + residual``, and the sum."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    return out, _rms_norm(library, x, _Norm(weight, eps, one_plus), residual, out.data_ptr())


def rms_norm_quantize(
    library: Library,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized rows of ``x + residual`` [M, K] as int8, their scales [M, K / group_size], and the sum."""
    x = x.contiguous()
    values, scales = _quantized(len(x), x.shape[1], group_size)
    return values, scales, _rms_norm(library, x, _Norm(weight, eps, one_plus), residual, None, (values, scales))


def silu_mul(library: Library, gate_up: Tensor) -> Tensor:
    return _gated_mul(library.silu_mul, gate_up)


def silu_mul_quantize(library: Library, gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    return _gated_mul_quantize(library.silu_mul, gate_up, group_size)


def gelu_mul(library: Library, gate_up: Tensor) -> Tensor:
    return _gated_mul(library.gelu_mul, gate_up)


def gelu_mul_quantize(library: Library, gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    return _gated_mul_quantize(library.gelu_mul, gate_up, group_size)


def add_scaled(library: Library, x: Tensor, update: Tensor, factor: float) -> Tensor:
    x, update = x.contiguous(), update.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    library.add_scaled(
        x.data_ptr(), update.data_ptr(), out.data_ptr(), len(x), x.shape[1], factor, torch.get_num_threads()
    )
    return out


def first_maxima(library: Library, x: Tensor) -> Tensor:
    """Return the argmax of each row of x [M, S], int64 [M]."""
    x = x.contiguous()
    indices = torch.empty(len(x), dtype=torch.int64)
    library.first_maxima(x.data_ptr(), indices.data_ptr(), *x.shape, torch.get_num_threads())
    return indices


def select_inputs(library: Library, x: Tensor, order: InputOrder) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    library.select_inputs(
        x.data_ptr(), order.indices.data_ptr(), out.data_ptr(), len(x), x.shape[1], torch.get_num_threads()
    )
    return out


def rotary_write(
    library: Library,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    one_plus: bool = False,
) -> Tensor:
    """start: int64 [1], the first slot, which the kernel reads when it runs. The rows must fit the cache."""
    qkv = qkv.contiguous()
    rows = len(qkv)
    kv_heads, _, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty((rows, heads, head_dim), dtype=torch.bfloat16)
    library.rotary_write(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        q.data_ptr(),
        *_addresses(keys, values),
        start.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        *_capacity_and_bits(keys),
        eps,
        one_plus,
        q_norm is not None and len(q_norm) != head_dim,
        torch.get_num_threads(),
    )
    return q


def block_attention(
    library: Library,
    q: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    mask: Tensor,
    options: AttentionOptions = PLAIN_ATTENTION,
) -> Tensor:
    """Every row attends to all slots below ``start``, int64 [1], and to the rows of the block that mask allows.

    mask: bool [R, R]. Raises ValueError for a mask of another shape.
    """
    q, mask = q.contiguous(), mask.contiguous()
    rows, heads, head_dim = q.shape
    if mask.shape != (rows, rows):
        raise ValueError(f"mask {list(mask.shape)} does not fit {rows} rows; it must be [{rows}, {rows}]")
    out = torch.empty((rows, heads * head_dim), dtype=torch.bfloat16)
    library.attention(
        q.data_ptr(),
        *_addresses(keys, values),
        mask.data_ptr(),
        out.data_ptr(),
        start.data_ptr(),
        rows,
        heads,
        len(keys),
        head_dim,
        *_capacity_and_bits(keys),
        options.window or 0,
        options.softcap or 0.0,
        options.scale or 0.0,
        torch.get_num_threads(),
    )
    return out


def _gated_mul(function: Callable[..., None], gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=torch.bfloat16)
    function(gate_up.data_ptr(), out.data_ptr(), None, None, rows, size, size, torch.get_num_threads())
    return out


def _gated_mul_quantize(
    function: Callable[..., None], gate_up: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    values, scales = _quantized(rows, size, group_size)
    group = size // scales.shape[1]
    function(gate_up.data_ptr(), None, values.data_ptr(), scales.data_ptr(), rows, size, group, torch.get_num_threads())
    return values, scales


def _addresses(keys: Slots, values: Slots) -> tuple[int, int, int | None, int | None]:
    """Return where keys and values are, and then where their scales are."""
    scales = [part.scales.data_ptr() if isinstance(part, QuantizedSlots) else None for part in (keys, values)]
    return keys.data_ptr(), values.data_ptr(), scales[0], scales[1]


def _capacity_and_bits(keys: Slots) -> tuple[int, int]:
    """Return the number of slots from head to head, of which ``keys`` may be only the first, and their bits."""
    codes, bits = (keys.codes, keys.bits) if isinstance(keys, QuantizedSlots) else (keys, 16)
    return codes.stride(0) // codes.shape[2], bits


def _quantized(rows: int, size: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Allocate int8 values [rows, size] and their scales."""
    groups = size // (group_size or size)
    return torch.empty((rows, size), dtype=torch.int8), torch.empty((rows, groups), dtype=torch.float32)


class _Norm(NamedTuple):
    weight: Tensor
    eps: float
    one_plus: bool


def _rms_norm(
    library: Library,
    x: Tensor,
    norm: _Norm,
    residual: Tensor | None,
    out: int | None,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Write the normalized rows to ``out``, or to ``quantized`` as values and scales; return the sum before."""
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
        norm.weight.data_ptr(),
        total_pointer,
        out,
        values,
        scales,
        x.numel() // size,
        size,
        group,
        norm.eps,
        norm.one_plus,
        torch.get_num_threads(),
    )
    return total
