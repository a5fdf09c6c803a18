"""``x W^T + bias`` with unquantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.cpu.calls import multiply
from quasar_kernels.cpu.library import ACTIVATION_DTYPES, Library
from quasar_kernels.dispatch import Kernel, Op
from quasar_kernels.matmul import Matmul, triton_matmul
from quasar_kernels.weights import DenseWeight

if TYPE_CHECKING:
    from quasar_kernels.triton.tuning import Tiling


def linear_bf16(x: Tensor, weight: DenseWeight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias`` with bfloat16 weights (float32 weights in exactness mode), summed in float32.

    x: float [M, K]; weight: [N, K]; bias: [N]. Returns [M, N] in the dtype of x.
    """
    out: Tensor = OP(x, weight, bias)
    return out


def linear_dense(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear_bf16` for a tensor, for which only Triton has a kernel. values: [N, K] in the dtype of x."""
    out: Tensor = DENSE(x, values, bias)
    return out


def _plain(x: Tensor, weight: DenseWeight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.values.to(x.dtype), bias)


def _library_takes(x: Tensor, weight: DenseWeight, bias: Tensor | None = None) -> bool:
    return x.dtype in ACTIVATION_DTYPES and weight.packed_for_cpu is not None


def _library(library: Library, x: Tensor, weight: DenseWeight, bias: Tensor | None = None) -> Tensor:
    packed = weight.packed_for_cpu
    assert packed is not None
    return multiply(library.linear_f32 if weight.dtype == torch.float32 else library.linear_bf16, packed, x, bias)


def _triton(x: Tensor, weight: DenseWeight, bias: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    return _triton_dense(x, weight.values, bias, tiling)


def _triton_dense(x: Tensor, values: Tensor, bias: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    from quasar_kernels.triton.linear_bf16 import linear_bf16
    from quasar_kernels.triton.tuning import Shape, tiling_for

    tiling = tiling or tiling_for(Shape(OP.name, len(x), *values.shape), x.device)
    return linear_bf16(x.contiguous(), values, bias, tiling)


OP = Matmul(
    "linear_bf16",
    plain=_plain,
    cpu=Kernel(_library_takes, _library),
    triton=triton_matmul(_triton),
    differentiable=False,
    weight_bits=16,
    round=lambda values, group_size: DenseWeight(values),
)
DENSE = Op("linear_dense", plain=F.linear, cpu=None, triton=triton_matmul(_triton_dense))
