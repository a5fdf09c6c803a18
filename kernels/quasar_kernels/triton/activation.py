"""The element-wise parts of SwiGLU and GeGLU, with optional quantization of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.quantize import quantized_room, store_quantized

BLOCK_ELEMENTS = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute `ops.silu_mul.silu_mul`. gate_up: float [M, 2 I], gate first; returns [M, I] in its dtype."""
    return _gated_mul(gate_up, gelu=False)


def silu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute `ops.silu_mul.silu_mul_quantize`: int8 [M, I] and float32 scales [M, G]."""
    return _gated_mul_quantize(gate_up, group_size, gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Compute `ops.gelu_mul.gelu_mul`. gate_up: float [M, 2 I], gate first; returns [M, I] in its dtype."""
    return _gated_mul(gate_up, gelu=True)


def gelu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute `ops.gelu_mul.gelu_mul_quantize`: int8 [M, I] and float32 scales [M, G]."""
    return _gated_mul_quantize(gate_up, group_size, gelu=True)


def _gated_mul(gate_up: Tensor, gelu: bool) -> Tensor:
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, BLOCK_ELEMENTS))
    block = BLOCK_ELEMENTS
    gated_mul_kernel[grid](gate_up, out, out, width, GELU=gelu, QUANTIZE=False, BLOCK=block, GROUP=block, num_warps=4)
    return out


def _gated_mul_quantize(gate_up: Tensor, group_size: int | None, gelu: bool) -> tuple[Tensor, Tensor]:
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out, scales = quantized_room(rows, width, group_size, gate_up.device)
    block = triton.next_power_of_2(width)
    gated_mul_kernel[(rows, 1)](
        gate_up,
        out,
        scales,
        width,
        GELU=gelu,
        QUANTIZE=True,
        BLOCK=block,
        GROUP=group_size or block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, scales


@triton.jit
def gated_mul_kernel(
    gate_up,
    out,
    scales,
    width,
    GELU: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (rows, blocks of the width). Rounds after SiLU or GELU and after the multiplication, as the model does."""
    dtype = gate_up.dtype.element_ty
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    slope = gate
    if GELU:
        # gelu(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)
        slope = 2.0 * 0.7978845608 * (gate + 0.044715 * gate * gate * gate)
    activated = (gate / (1.0 + tl.exp(-slope))).to(dtype).to(tl.float32)
    result = (activated * up).to(dtype)
    if QUANTIZE:
        store_quantized(result.to(tl.float32), out, scales, row, width, BLOCK, GROUP)
    else:
        tl.store(out + row * width + column, result, mask=inside)
