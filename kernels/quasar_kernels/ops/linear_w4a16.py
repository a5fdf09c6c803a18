"""``x W^T + bias`` with 4-bit weights in groups and activations as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.matmul import Matmul, cpu_matmul, triton_matmul
from quasar_kernels.weights import Int4Weight

if TYPE_CHECKING:
    from quasar_kernels.triton.tuning import Tiling

# PyTorch's packed 4-bit matmul reads the weights again every few rows. For more rows, dequantizing once is faster.
TORCH_INT4_MAX_ROWS = 64
TRITON_GROUP_SIZES = (32, 64, 128, 256)


def linear_w4a16(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias`` with group-wise 4-bit weights ``(q - zero) * scale``.

    x: float [M, K]; weight: [N, K]; bias: [N]. Returns [M, N] in the dtype of x.
    """
    out: Tensor = OP(x, weight, bias)
    return out


def _plain(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.bfloat16 and len(x) <= TORCH_INT4_MAX_ROWS and (prepared := weight.packed_for_torch()):
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), prepared[0], weight.group_size, prepared[1])
        return out if bias is None else out + bias
    return F.linear(x, weight.dequantize().to(x.dtype), bias)


def _triton(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    from quasar_kernels.triton.linear_w4 import linear_w4a16
    from quasar_kernels.triton.tuning import Shape, tiling_for

    shape = Shape(OP.name, len(x), weight.outputs, weight.inputs, weight.group_size)
    return linear_w4a16(x.contiguous(), weight.packed_for_triton(), bias, tiling or tiling_for(shape, x.device))


OP = Matmul(
    "linear_w4a16",
    plain=_plain,
    cpu=cpu_matmul("linear_w4a16"),
    triton=triton_matmul(_triton, TRITON_GROUP_SIZES),
    differentiable=False,
    weight_bits=4,
    round=Int4Weight.rounded,
)
