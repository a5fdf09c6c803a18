"""The ops as models call them: one signature per op, the backend chosen by device and dtype.

On CUDA the Triton kernels do the work where they have one for the shape; otherwise PyTorch's own operations
compute what `kernels.reference` defines.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

if TYPE_CHECKING:
    from kernels.triton.int4_packing import PackedInt4

# PyTorch's packed 4-bit product re-reads the weights every few rows: beyond this many, dequantizing once is cheaper.
PACKED_INT4_MAX_ROWS = 64
CPU_INT4_GROUP_SIZES = (32, 64, 128, 256)
CUDA_INT_MM_MIN_ROWS = 17


@dataclass(frozen=True)
class Int8Weight:
    """values: int8 [N, K]; scales: float32 [N], one per output channel."""

    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Int4Weight:
    """4-bit weight ``(q - zero) * scale`` in groups along K.

    packed: uint8 [N, K / 2] as in `reference.pack_int4`; scales, zeros: [N, K / group_size], float32 here and
    counted as 16-bit scales and 4-bit zero points (``nbytes``), the form in which kernels read them.
    prepared: what the backend made of it once, or None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    symmetric: bool
    prepared: Tensor | None = None
    prepared_scales: Tensor | None = None

    @staticmethod
    def prepare(packed: Tensor, scales: Tensor, zeros: Tensor, symmetric: bool, dtype: torch.dtype) -> Int4Weight:
        """Pack a weight for products with activations of ``dtype``.

        BF16 on a CPU uses PyTorch's packed layout. Float32 is the exactness mode: the dequantized weight is kept.
        """
        columns = packed.shape[1] * 2
        group_size = columns // scales.shape[1]
        if dtype == torch.float32:
            return Int4Weight(packed, scales, zeros, symmetric, reference.dequantize_int4(packed, scales, zeros))
        if packed.device.type == "cpu" and group_size in CPU_INT4_GROUP_SIZES and len(packed) % 16 == 0:
            values = reference.unpack_int4(packed).to(torch.int32)
            # PyTorch computes (q - 8) * scale + zero.
            offsets = (8 - zeros) * scales
            prepared = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
            scales_and_zeros = torch.stack([scales, offsets], dim=-1).transpose(0, 1).contiguous().to(dtype)
            return Int4Weight(packed, scales, zeros, symmetric, prepared, scales_and_zeros)
        return Int4Weight(packed, scales, zeros, symmetric)

    @property
    def group_size(self) -> int:
        return self.packed.shape[1] * 2 // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        zero_bytes = 0 if self.symmetric else self.zeros.numel() / 2
        return int(self.packed.nbytes + 2 * self.scales.numel() + zero_bytes)


def linear_w8a8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, int8 × int8 with per-token and per-channel scales. x: [M, K]; returns [M, N]."""
    if (gpu := gpu_backend(x)) and gpu.supports("linear_w8a8", x):
        return gpu.linear_w8a8(x, weight.values, weight.scales, bias)
    tokens, token_scales = reference.quantize_tokens(x)
    rows = len(x)
    if x.is_cuda and rows < CUDA_INT_MM_MIN_ROWS:
        tokens = F.pad(tokens, (0, 0, 0, CUDA_INT_MM_MIN_ROWS - rows))
    accumulated = torch._int_mm(tokens, weight.values.T)[:rows]
    out = accumulated.float() * (token_scales * weight.scales)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w4a16(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights. x: [M, K]; returns [M, N]."""
    if gpu := _gpu_with_int4("linear_w4a16", x, weight):
        return gpu.linear_w4a16(x, packed_for_gpu(weight), bias)
    if weight.prepared_scales is not None and weight.prepared is not None and len(x) <= PACKED_INT4_MAX_ROWS:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.prepared, weight.group_size, weight.prepared_scales
        )
        return out if bias is None else out + bias
    if x.dtype == torch.float32 and weight.prepared is not None:
        return F.linear(x, weight.prepared, bias)
    dense = reference.dequantize_int4(weight.packed, weight.scales, weight.zeros).to(x.dtype)
    return F.linear(x, dense, bias)


def linear_w4a8(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights and per-token int8 activations. x: [M, K]; returns [M, N]."""
    if gpu := _gpu_with_int4("linear_w4a8", x, weight):
        return gpu.linear_w4a8(x, packed_for_gpu(weight), bias)
    return reference.linear_w4a8(x, weight.packed, weight.scales, weight.zeros, bias)


def gpu_backend(x: Tensor) -> ModuleType | None:
    """`kernels.triton.ops` for tensors on a GPU that it has kernels for, where Triton is installed; else None."""
    ops = _triton_ops() if x.is_cuda else None
    return ops if ops is not None and ops.capable(x.device) else None


def packed_for_gpu(weight: Int4Weight) -> PackedInt4:
    """The weight as the Triton kernels read it."""
    ops = _triton_ops()
    assert ops is not None
    return ops.packed_int4(weight, weight.packed, weight.scales, weight.zeros)


def _gpu_with_int4(op: str, x: Tensor, weight: Int4Weight) -> ModuleType | None:
    gpu = gpu_backend(x)
    if gpu is None:
        return None
    return gpu if gpu.supports(op, x, weight.group_size) else None


@functools.cache
def _triton_ops() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from kernels.triton import ops

    return ops
