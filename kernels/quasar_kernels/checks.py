"""What the ops require of their arguments before a kernel computes them: the kernels themselves check nothing.

Every function takes the arguments of an op and raises ValueError, which names the argument, if a kernel would read or
write outside of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quasar_kernels.reference import slot_groups
from quasar_kernels.slots import QuantizedSlots, Slots


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> None:
    size = x.shape[-1]
    _require("weight", weight, (size,), contiguous=True, device=x.device)
    if residual is not None:
        _require("residual", residual, x.shape, x.dtype, device=x.device)
    _require_groups(size, group_size)


def add_scaled(x: Tensor, update: Tensor, factor: float) -> None:
    _require("update", update, x.shape, x.dtype, device=x.device)


def gated_mul(gate_up: Tensor, group_size: int | None = None) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected two halves [M, 2 S], got {list(gate_up.shape)}")
    _require_groups(gate_up.shape[1] // 2, group_size)


def first_maxima(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected [M, S] with values in every row, got {list(x.shape)}")


def select_inputs(x: Tensor, order: Any) -> None:
    """order: `quasar_kernels.InputOrder`, which checks its indices."""
    if x.dim() != 2 or x.shape[1] != len(order.indices):
        raise ValueError(f"x: expected [M, {len(order.indices)}], got {list(x.shape)}")
    _require("x", x, x.shape, device=order.indices.device)


def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
) -> None:
    _require_cache(keys, values, qkv)
    kv_heads, capacity, head_dim = keys.shape
    if qkv.dim() != 2 or qkv.shape[1] % head_dim or qkv.shape[1] <= 2 * kv_heads * head_dim:
        raise ValueError(f"qkv: expected [R, (H + 2 * {kv_heads}) * {head_dim}], got {list(qkv.shape)}")
    rows = len(qkv)
    if rows > capacity:
        raise ValueError(f"qkv: {rows} rows do not fit into a cache of {capacity} slots")
    for name, part in (("cos", cos), ("sin", sin)):
        _require(name, part, (rows, head_dim), torch.float32, contiguous=True, device=qkv.device)
    _require("start", start, (1,), torch.int64, device=qkv.device)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or neither")
    if q_norm is not None and k_norm is not None:
        whole = q_norm.shape != (head_dim,)
        for name, norm, width in (("q_norm", q_norm, qkv.shape[1] - 2 * len(keys) * head_dim), ("k_norm", k_norm, 0)):
            size = (width or len(keys) * head_dim) if whole else head_dim
            _require(name, norm, (size,), contiguous=True, device=qkv.device)


def block_attention(
    q: Tensor, keys: Slots, values: Slots, start: Tensor, block_mask: Tensor, options: Any = None
) -> None:
    _require_cache(keys, values, q)
    kv_heads, _, head_dim = keys.shape
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ValueError(f"q: expected [R, a multiple of {kv_heads}, {head_dim}], got {list(q.shape)}")
    _require("start", start, (1,), torch.int64, device=q.device)
    _require("block_mask", block_mask, (len(q), len(q)), device=q.device)


def matmul(x: Any, weight: Any, bias: Tensor | None = None, tiling: Any = None) -> None:
    """x: Tensor, or `Quantized`; weight: Tensor [N, K], or a weight of `quasar_kernels.weights`."""
    outputs, inputs = weight.shape if isinstance(weight, Tensor) else (weight.outputs, weight.inputs)
    rows = x if isinstance(x, Tensor) else x.values
    if rows.dim() != 2 or rows.shape[1] != inputs:
        raise ValueError(f"x: expected [M, {inputs}], got {list(rows.shape)}")
    if not isinstance(x, Tensor):
        groups = inputs // (getattr(weight, "group_size", 0) or inputs)
        _require("values of x", x.values, rows.shape, torch.int8)
        _require("scales of x", x.scales, (len(rows), groups), torch.float32, device=rows.device)
    if bias is not None:
        _require("bias", bias, (outputs,), device=rows.device)


def _require_cache(keys: Slots, values: Slots, rows: Tensor) -> None:
    if isinstance(keys, QuantizedSlots):
        if not isinstance(values, QuantizedSlots):
            raise ValueError(f"values: expected them in {keys.bits} bits like the keys, got {values.dtype}")
        _require_quantized_cache(keys, values, rows.device)
        return
    if keys.dim() != 3 or 0 in keys.shape:
        raise ValueError(f"keys: expected [H_kv, capacity, D], got {list(keys.shape)}")
    if isinstance(values, QuantizedSlots):
        raise ValueError(f"values: expected {keys.dtype} like the keys, got {values.bits} bits")
    _require("keys", keys, keys.shape, rows.dtype, device=rows.device)
    _require("values", values, keys.shape, keys.dtype, device=rows.device)
    _require_consecutive(keys, values, "keys and values")


def _require_quantized_cache(keys: QuantizedSlots, values: QuantizedSlots, device: torch.device) -> None:
    codes = keys.codes
    if codes.dim() != 3 or 0 in codes.shape or codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(
            f"codes of keys: expected int8 or uint8 [H_kv, capacity, D], got {codes.dtype} {list(codes.shape)}"
        )
    heads, capacity, head_dim = keys.shape
    width, dtype = (1, torch.float32) if keys.bits == 8 else (2 * slot_groups(head_dim), torch.float16)
    for name, part in (("keys", keys), ("values", values)):
        _require(f"codes of {name}", part.codes, codes.shape, codes.dtype, device=device)
        _require(f"scales of {name}", part.scales, (heads, capacity, width), dtype, device=device)
    _require_consecutive(keys.codes, values.codes, "codes of keys and values")
    _require_consecutive(keys.scales, values.scales, "scales of keys and values")
    if heads > 1 and keys.scales.stride(0) // width != codes.stride(0) // codes.shape[2]:
        raise ValueError("codes and scales: expected as many slots from head to head in both")


def _require_consecutive(keys: Tensor, values: Tensor, name: str) -> None:
    if keys.stride() != values.stride() or keys.stride()[1:] != (keys.shape[2], 1):
        raise ValueError(
            f"{name}: expected heads of consecutive slots, got strides {keys.stride()} and {values.stride()}"
        )


def _require_groups(size: int, group_size: int | None) -> None:
    if group_size is not None and (group_size < 1 or size % group_size):
        raise ValueError(f"group_size: expected a divisor of {size}, got {group_size}")


def _require(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype | None = None,
    contiguous: bool = False,
    device: torch.device | None = None,
) -> None:
    right = tensor.shape == shape and dtype in (None, tensor.dtype) and device in (None, tensor.device)
    if not right or (contiguous and not tensor.is_contiguous()):
        raise ValueError(
            f"{name}: expected {dtype or 'values'} {list(shape)}{' without gaps' if contiguous else ''} on "
            f"{device or tensor.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
