"""``x W^T + bias`` with int8 weights, scaled per channel or per group, and activations that are not quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.dispatch import Kernel
from quasar_kernels.matmul import Matmul, compute_dtype, cpu_matmul, triton_matmul
from quasar_kernels.weights import GroupInt8Weight, Int8Weight

if TYPE_CHECKING:
    from quasar_kernels.triton.tuning import Tiling

# A dot product of 16-bit values takes 16 inputs.
TRITON_GROUP_SIZES = (16, 32, 64, 128, 256)


def linear_w8a16(x: Tensor, weight: Int8Weight | GroupInt8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias`` with int8 weights and scales per channel or group.

    x: float [M, K]; weight: [N, K]; bias: [N]. Returns [M, N] in the dtype of x. The compiled kernels round
    activations to 15-bit integers with one scale per token, which is finer than bfloat16 near a token's largest value.
    If the weight has groups, so have the activations, and float32 activations are not rounded.
    """
    out: Tensor = OP(x, weight, bias)
    return out


def _plain(x: Tensor, weight: Int8Weight | GroupInt8Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, GroupInt8Weight):
        return F.linear(x, weight.dequantize().to(x.dtype), bias)
    computed = compute_dtype(x.dtype)
    out = F.linear(x, weight.values.to(x.dtype)).to(computed) * weight.scales
    return (out if bias is None else out + bias.to(computed)).to(x.dtype)


def _triton(
    x: Tensor, weight: Int8Weight | GroupInt8Weight, bias: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    from quasar_kernels.triton.linear_bf16 import linear_bf16
    from quasar_kernels.triton.linear_w8_groups import linear_w8_groups
    from quasar_kernels.triton.tuning import Shape, tiling_for

    group_size = weight.group_size if isinstance(weight, GroupInt8Weight) else 0
    tiling = tiling or tiling_for(Shape(OP.name, len(x), weight.outputs, weight.inputs, group_size), x.device)
    if isinstance(weight, GroupInt8Weight):
        return linear_w8_groups(x.contiguous(), weight.packed_for_triton(), bias, tiling)
    return linear_bf16(x.contiguous(), weight.values, bias, tiling, weight.scales)


_TRITON = triton_matmul(_triton)


def _triton_takes(x: Tensor, weight: Int8Weight | GroupInt8Weight, bias: Tensor | None = None) -> bool:
    fits = isinstance(weight, Int8Weight) or weight.group_size in TRITON_GROUP_SIZES
    return fits and _TRITON.supports(x, weight, bias)


OP = Matmul(
    "linear_w8a16",
    plain=_plain,
    cpu=cpu_matmul("linear_w8a16"),
    triton=Kernel(_triton_takes, _TRITON.run),
    differentiable=False,
    weight_bits=8,
    round=lambda values, group_size: Int8Weight.rounded(values),
)
