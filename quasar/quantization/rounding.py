"""Round-to-nearest quantization of weight matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import Int8Weight

INT4_LEVELS = 15


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Symmetric int8 per output channel: ``w ≈ values * scale``, values in [-127, 127]. weight: float [N, K]."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = torch.round(wide / scales.unsqueeze(1)).to(torch.int8)
    return Int8Weight(values, scales)


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit integers in groups of ``group_size`` along K: ``w ≈ (q - zero) * scale``, q in 0..15.

    weight: float [N, K], K a multiple of group_size. Returns q uint8 [N, K] and scales and zeros, float32
    [N, K / group_size]. Symmetric grids have zero 8 and span [-7, 7]; asymmetric ones span the group's range,
    extended to hold zero.
    """
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // group_size, group_size)
    if symmetric:
        scales = groups.abs().amax(dim=2) / 7
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        zeros = torch.full_like(scales, 8)
    else:
        low = groups.amin(dim=2).clamp(max=0.0)
        high = groups.amax(dim=2).clamp(min=0.0)
        scales = (high - low) / INT4_LEVELS
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        zeros = torch.round(-low / scales)
    values = torch.round(groups / scales.unsqueeze(2)) + zeros.unsqueeze(2)
    return values.clamp_(0, INT4_LEVELS).to(torch.uint8).view(rows, columns), scales, zeros
