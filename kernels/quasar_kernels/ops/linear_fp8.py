"""``x W^T + bias`` with FP8 weights and FP8 activations, both E4M3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.cpu.calls import multiply
from quasar_kernels.cpu.library import Library
from quasar_kernels.dispatch import Kernel
from quasar_kernels.gpu import multiplies_fp8
from quasar_kernels.matmul import Matmul, compute_dtype, triton_matmul
from quasar_kernels.reference import quantize_tokens_fp8
from quasar_kernels.weights import Fp8Weight

if TYPE_CHECKING:
    from quasar_kernels.triton.tuning import Tiling


def linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias`` in FP8: the dynamic scheme of vLLM and compressed-tensors.

    x: float [M, K], quantized inside with one scale per token; weight: [N, K], one scale per output channel; bias: [N].
    Returns [M, N] in the dtype of x. The product of two E4M3 numbers is exact in float32; products are added in
    float32, then scaled per token and output channel.

    Only GPUs of compute capability 8.9 or later multiply FP8. Everywhere else the result is the same up to the order of
    the sums, but no faster than 16 bit: the numbers are widened.
    """
    out: Tensor = OP(x, weight, bias)
    return out


def _plain(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    tokens, token_scales = quantize_tokens_fp8(x)
    computed = compute_dtype(x.dtype)
    sums = F.linear(tokens.to(computed), weight.values.to(computed))
    return _scaled(sums, token_scales, weight, bias, x.dtype)


def _library_takes(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> bool:
    return x.dtype != torch.float64 and weight.packed_for_cpu is not None


def _library(library: Library, x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """Multiply with the kernel for bfloat16 weights, which holds every E4M3 number exactly."""
    packed = weight.packed_for_cpu
    assert packed is not None
    tokens, token_scales = quantize_tokens_fp8(x)
    sums = multiply(library.linear_bf16, packed, tokens.float(), None)
    return _scaled(sums, token_scales, weight, bias, x.dtype)


def _scaled(sums: Tensor, token_scales: Tensor, weight: Fp8Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = sums * (token_scales.to(sums.dtype) * weight.scales)
    return (out if bias is None else out + bias.to(sums.dtype)).to(dtype)


def _triton(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    from quasar_kernels.triton.linear_fp8 import linear_fp8
    from quasar_kernels.triton.quantize import quantize_tokens_fp8
    from quasar_kernels.triton.tuning import Shape, tiling_for

    tokens, token_scales = quantize_tokens_fp8(x.contiguous())
    values = weight.values
    tiling = tiling or tiling_for(Shape(OP.name, len(x), *values.shape), x.device)
    return linear_fp8(tokens, token_scales, values, weight.scales, bias, x.dtype, tiling)


OP = Matmul(
    "linear_fp8",
    plain=_plain,
    cpu=Kernel(_library_takes, _library),
    triton=triton_matmul(_triton, device_takes=multiplies_fp8),
    differentiable=False,
    weight_bits=8,
    activations="fp8",
    round=lambda values, group_size: Fp8Weight.rounded(values),
)
