"""Residual add, RMS normalization and quantization of the result in one pass over a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.quantize import quantized_room, store_quantized

BLOCK_ELEMENTS = 1024


def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `ops.add_rms_norm.add_rms_norm`: the normalized rows and the sum, both [M, K] in the dtype of x."""
    out = torch.empty_like(x)
    total = _launch(x, _Norm(weight, eps, one_plus), residual, out, None)
    return out, total


def add_rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ops.add_rms_norm.add_rms_norm_quantize`: int8 [M, K], float32 scales [M, G] and the sum."""
    out, scales = quantized_room(len(x), x.shape[1], group_size, x.device)
    total = _launch(x, _Norm(weight, eps, one_plus), residual, out, scales, group_size)
    return out, scales, total


def add_scaled(x: Tensor, update: Tensor, factor: float) -> Tensor:
    """Compute `ops.add_scaled.add_scaled`: [M, K] in the dtype of x."""
    x, update = x.contiguous(), update.contiguous()
    out = torch.empty_like(x)
    add_scaled_kernel[(triton.cdiv(x.numel(), BLOCK_ELEMENTS),)](
        x, update, out, factor, x.numel(), BLOCK=BLOCK_ELEMENTS, num_warps=4
    )
    return out


class _Norm(NamedTuple):
    weight: Tensor
    eps: float
    one_plus: bool


def _launch(
    x: Tensor,
    norm: _Norm,
    residual: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    group_size: int | None = None,
) -> Tensor:
    rows, width = x.shape
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        total,
        norm.weight,
        out,
        norm.weight if scales is None else scales,
        norm.eps,
        width,
        ONE_PLUS=norm.one_plus,
        ADD=residual is not None,
        QUANTIZE=scales is not None,
        BLOCK=block,
        GROUP=group_size or block,
        num_warps=min(16, max(1, block // 512)),
    )
    return total


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    total,
    weight,
    out,
    scales,
    eps,
    width,
    ONE_PLUS: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (rows,). Rounds after the addition, after the normalization and at the end, as the model does."""
    dtype = x.dtype.element_ty
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    value = tl.load(x + place, mask=inside, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + place, value, mask=inside)
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, axis=0) / width
    normalized = wide * (1.0 / tl.sqrt_rn(mean + eps))
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ONE_PLUS:
        result = (normalized * (1.0 + factor)).to(dtype)
    else:
        result = (normalized.to(dtype).to(tl.float32) * factor).to(dtype)
    if QUANTIZE:
        store_quantized(result.to(tl.float32), out, scales, row, width, BLOCK, GROUP)
    else:
        tl.store(out + place, result, mask=inside)


@triton.jit(do_not_specialize=["size"])
def add_scaled_kernel(x, update, out, factor, size, BLOCK: tl.constexpr):
    """Grid: (blocks of the elements,). Rounds after the multiplication and after the addition, as the model does."""
    dtype = x.dtype.element_ty
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    scaled = (tl.load(update + place, mask=inside, other=0.0).to(tl.float32) * factor).to(dtype).to(tl.float32)
    total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + scaled
    tl.store(out + place, total.to(dtype), mask=inside)
