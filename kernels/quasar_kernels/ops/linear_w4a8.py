"""``x W^T + bias`` with 4-bit weights and int8 activations, both in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.matmul import Matmul, as_quantized, compute_dtype, cpu_matmul, triton_matmul
from quasar_kernels.reference import unpack_int4
from quasar_kernels.weights import Int4Weight, Quantized

if TYPE_CHECKING:
    from quasar_kernels.triton.tuning import Tiling

# An int8 tensor-core instruction takes 32 inputs, and a group is multiplied in two halves.
TRITON_GROUP_SIZES = (64, 128, 256)


def linear_w4a8(x: Tensor | Quantized, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias`` with 4-bit weights and int8 activations, both with one scale per group.

    x: float [M, K], quantized inside in the groups of the weight, or `Quantized` in that way by the op before; weight:
    [N, K]; bias: [N]. Returns [M, N] in the dtype of x. Within a group the sum of ``token * (q - zero)`` is an exact
    integer for integer zero points; groups are scaled and added in float32, in ascending order.
    """
    out: Tensor = OP(x, weight, bias)
    return out


def _plain(x: Tensor | Quantized, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute one matmul of integers per group.

    The integers and their sums are exact in float32 for groups of up to 8192 inputs, since 127 * 15 * 8192 < 2^24. The
    integers are also exact in the 16-bit formats to which PyTorch may be configured to round its operands.
    """
    tokens, token_scales, dtype = as_quantized(x, weight.group_size)
    packed, scales, zeros = weight.canonical()
    size, computed = weight.group_size, compute_dtype(dtype)
    token_groups = tokens.to(computed).split(size, dim=1)
    weight_groups = unpack_int4(packed).split(size, dim=1)
    out = torch.zeros(len(tokens), weight.outputs, dtype=computed, device=tokens.device)
    for group, (rows, values) in enumerate(zip(token_groups, weight_groups, strict=True)):
        sums = F.linear(rows, values.to(computed) - zeros[:, group, None])
        out += sums * (token_scales[:, group, None].to(computed) * scales[:, group])
    return (out if bias is None else out + bias.to(computed)).to(dtype)


def _triton(
    x: Tensor | Quantized, weight: Int4Weight, bias: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    from quasar_kernels.triton.linear_w4 import linear_w4a8
    from quasar_kernels.triton.quantize import quantized
    from quasar_kernels.triton.tuning import Shape, tiling_for

    tokens, token_scales, dtype = quantized(x, weight.group_size)
    shape = Shape(OP.name, len(tokens), weight.outputs, weight.inputs, weight.group_size)
    tiling = tiling or tiling_for(shape, tokens.device)
    return linear_w4a8(tokens, token_scales, weight.packed_for_triton(), bias, dtype, tiling)


OP = Matmul(
    "linear_w4a8",
    plain=_plain,
    cpu=cpu_matmul("linear_w4a8"),
    triton=triton_matmul(_triton, TRITON_GROUP_SIZES),
    differentiable=False,
    weight_bits=4,
    activations="int8 groups",
    round=Int4Weight.rounded,
)
