"""``x W^T + bias`` with int8 weights and int8 activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.matmul import Matmul, as_quantized, compute_dtype, cpu_matmul, triton_matmul
from quasar_kernels.weights import Int8Weight, Quantized

if TYPE_CHECKING:
    from quasar_kernels.triton.tuning import Tiling

# An int8 tensor-core instruction takes 32 inputs.
TRITON_GROUP_SIZES = (0, 32, 64, 128, 256)

CUDA_INT_MM_MIN_ROWS = 17
"""`torch._int_mm` refuses fewer rows on CUDA."""


def linear_w8a8(x: Tensor | Quantized, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias`` in int8. The int32 sums are exact, and scaled per token and output channel in float32.

    x: float [M, K], quantized inside with one scale per token, or per token and group if the weight has a
    ``group_size``, or `Quantized` in that way by the op before; weight: [N, K]; bias: [N]. Returns [M, N] in the dtype
    of x. Groups are scaled and added in float32, in ascending order.
    """
    out: Tensor = OP(x, weight, bias)
    return out


def _plain(x: Tensor | Quantized, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    tokens, token_scales, dtype = as_quantized(x, weight.group_size or None)
    rows, computed = len(tokens), compute_dtype(dtype)
    if tokens.is_cuda and rows < CUDA_INT_MM_MIN_ROWS:
        tokens = F.pad(tokens, (0, 0, 0, CUDA_INT_MM_MIN_ROWS - rows))
    if weight.group_size:
        out = torch.zeros(rows, weight.outputs, dtype=computed, device=tokens.device)
        token_groups, value_groups = (part.split(weight.group_size, dim=1) for part in (tokens, weight.values))
        for group, (inputs, values) in enumerate(zip(token_groups, value_groups, strict=True)):
            sums = torch._int_mm(inputs.contiguous(), values.T)[:rows]
            out += sums.to(computed) * token_scales[:, group, None].to(computed)
        out *= weight.scales
    else:
        sums = torch._int_mm(tokens, weight.values.T)[:rows]
        out = sums.to(computed) * (token_scales.to(computed) * weight.scales)
    return (out if bias is None else out + bias.to(computed)).to(dtype)


def _triton(
    x: Tensor | Quantized, weight: Int8Weight, bias: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    from quasar_kernels.triton.linear_w8a8 import linear_w8a8
    from quasar_kernels.triton.quantize import quantized
    from quasar_kernels.triton.tuning import Shape, tiling_for

    tokens, token_scales, dtype = quantized(x, weight.group_size or None)
    values = weight.values
    shape = Shape(OP.name, len(tokens), weight.outputs, weight.inputs, weight.group_size)
    tiling = tiling or tiling_for(shape, tokens.device)
    return linear_w8a8(tokens, token_scales, values, weight.scales, bias, dtype, tiling)


OP = Matmul(
    "linear_w8a8",
    plain=_plain,
    cpu=cpu_matmul("linear_w8a8"),
    triton=triton_matmul(_triton, TRITON_GROUP_SIZES),
    differentiable=False,
    weight_bits=8,
    activations="int8",
    round=lambda values, group_size: Int8Weight.rounded(values),
)
