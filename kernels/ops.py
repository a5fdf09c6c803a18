"""The ops as models call them: one signature per op, the backend chosen by device and dtype.

The backend here is PyTorch's own operations, which run everywhere and compute what `kernels.reference` defines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

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
    tokens, token_scales = reference.quantize_tokens(x)
    rows = len(x)
    if x.is_cuda and rows < CUDA_INT_MM_MIN_ROWS:
        tokens = F.pad(tokens, (0, 0, 0, CUDA_INT_MM_MIN_ROWS - rows))
    accumulated = torch._int_mm(tokens, weight.values.T)[:rows]
    out = accumulated.float() * (token_scales * weight.scales)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w4a16(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights. x: [M, K]; returns [M, N]."""
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
    return reference.linear_w4a8(x, weight.packed, weight.scales, weight.zeros, bias)
