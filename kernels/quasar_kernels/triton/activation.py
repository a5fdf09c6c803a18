"""The element-wise part of SwiGLU, with optional quantization of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.quantize import quantized_room, store_quantized

BLOCK_ELEMENTS = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute `ops.silu_mul.silu_mul`. gate_up: float [M, 2 I], gate first; returns [M, I] in its dtype."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, BLOCK_ELEMENTS))
    block = BLOCK_ELEMENTS
    silu_mul_kernel[grid](gate_up, out, out, width, QUANTIZE=False, BLOCK=block, GROUP=block, num_warps=4)
    return out


def silu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute `ops.silu_mul.silu_mul_quantize`: int8 [M, I] and float32 scales [M, G]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out, scales = quantized_room(rows, width, group_size, gate_up.device)
    block = triton.next_power_of_2(width)
    silu_mul_kernel[(rows, 1)](
        gate_up,
        out,
        scales,
        width,
        QUANTIZE=True,
        BLOCK=block,
        GROUP=group_size or block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, scales


@triton.jit
def silu_mul_kernel(
    gate_up,
    out,
    scales,
    width,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (rows, blocks of the width). Rounds after SiLU and after the multiplication, as the model does."""
    dtype = gate_up.dtype.element_ty
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    result = (silu * up).to(dtype)
    if QUANTIZE:
        store_quantized(result.to(tl.float32), out, scales, row, width, BLOCK, GROUP)
    else:
        tl.store(out + row * width + column, result, mask=inside)
