"""Dynamic quantization of activations: one scale per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import dependent, wait


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_tokens`: int8 [M, K] and float32 scales [M, 1]. x: float [M, K], contiguous rows."""
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    quantize_tokens_kernel[(rows,)](x, out, scales, width, BLOCK=block, num_warps=warps, **dependent(x.device))
    return out, scales


@triton.jit
def quantize_tokens_kernel(x, out, scales, width, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Grid: (rows,)."""
    wait(DEPENDENT)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    place = row * width + column
    quantized, scale = quantize_row(tl.load(x + place, mask=column < width, other=0.0).to(tl.float32))
    tl.store(out + place, quantized, mask=column < width)
    tl.store(scales + row, scale)


@triton.jit
def quantize_row(value):
    """int8 of a float32 row and its scale; the same integers as the reference, ties to even."""
    largest = tl.max(tl.abs(value), axis=0)
    scale = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
    # Above 2^23 a float32 has no fraction left: adding and subtracting 1.5 * 2^23 rounds to an integer.
    rounded = (tl.div_rn(value, scale) + 12582912.0) - 12582912.0
    return rounded.to(tl.int8), scale
