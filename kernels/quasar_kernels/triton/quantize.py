"""Dynamic quantization of activations: one scale per token, or per group of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.weights import Quantized


def quantize_tokens(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_tokens`: int8 [M, K] and float32 scales [M, K / group_size].

    x: float [M, K] with contiguous rows
    """
    rows, width = x.shape
    out, scales = quantized_room(rows, width, group_size, x.device)
    block = triton.next_power_of_2(width)
    quantize_tokens_kernel[(rows,)](
        x,
        out,
        scales,
        width,
        BLOCK=block,
        GROUP=group_size or block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, scales


def quantize_tokens_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_tokens_fp8`: float8_e4m3fn [M, K] and float32 scales [M, 1].

    x: float [M, K] with contiguous rows
    """
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    quantize_tokens_fp8_kernel[(rows,)](x, out, scales, width, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out, scales


def quantized(x: Tensor | Quantized, group_size: int | None = None) -> Quantized:
    """Quantize activations per token or per group, unless they are quantized already."""
    return x if isinstance(x, Quantized) else Quantized(*quantize_tokens(x.contiguous(), group_size), x.dtype)


def quantized_room(rows: int, width: int, group_size: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate tensors for quantized rows and their scales."""
    values = torch.empty(rows, width, dtype=torch.int8, device=device)
    return values, torch.empty(rows, width // (group_size or width), dtype=torch.float32, device=device)


@triton.jit
def quantize_tokens_kernel(x, out, scales, width, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Grid: (rows,)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    store_quantized(value, out, scales, row, width, BLOCK, GROUP)


@triton.jit
def quantize_tokens_fp8_kernel(x, out, scales, width, BLOCK: tl.constexpr):
    """Grid: (rows,). A NaN stays a NaN."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=0)
    scale = tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0)
    saturated = tl.clamp(tl.div_rn(value, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, saturated.to(tl.float8e4nv), mask=column < width)


@triton.jit
def store_quantized(value, out, scales, row, width, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Quantize the first ``width`` elements of a float32 row [BLOCK] in groups, and store them.

    GROUP is BLOCK for one scale per row. The integers equal those of the reference, which rounds ties to even.
    """
    column = tl.arange(0, BLOCK)
    if GROUP == BLOCK:
        rounded, scale = quantize(value, tl.max(tl.abs(value), axis=0))
        tl.store(scales + row, scale)
    else:
        group = tl.arange(0, BLOCK // GROUP)
        groups = tl.reshape(value, [BLOCK // GROUP, GROUP])
        largest = tl.max(tl.abs(groups), axis=1)
        rounded, scale = quantize(groups, largest[:, None])
        tl.store(
            scales + row * (width // GROUP) + group, tl.reshape(scale, [BLOCK // GROUP]), mask=group * GROUP < width
        )
        rounded = tl.reshape(rounded, [BLOCK])
    tl.store(out + row * width + column, rounded, mask=column < width)


@triton.jit
def quantize(value, largest):
    """Return float32 values rounded to int8, and their scale, given the largest magnitudes."""
    scale = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
    # A float32 above 2^23 has no fraction, so adding and subtracting 1.5 * 2^23 rounds to an integer.
    rounded = (tl.div_rn(value, scale) + 12582912.0) - 12582912.0
    return rounded.to(tl.int8), scale
