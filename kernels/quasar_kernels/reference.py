"""Definitions in PyTorch's own operations that several ops use: int8 and int4, norms, rotation."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
FP8_MAX = 448.0
"""Largest number of E4M3 (`torch.float8_e4m3fn`), which has no infinity."""


def quantize_tokens(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic quantization of each row, or of each group of ``group_size`` elements of a row, to int8.

    x: float [M, K]. Returns int8 [M, K] and the float32 scales [M, K / group_size] ([M, 1] without groups),
    ``x ≈ values * scales``. Values lie in [-127, 127]; a row or group of zeros gets scale 1.
    """
    size = group_size or x.shape[1]
    groups = x.float().view(len(x), x.shape[1] // size, size)
    largest = groups.abs().amax(dim=2, keepdim=True)
    # CUDA divides by a constant by multiplying by its rounded reciprocal. A value of half the largest one, which is a
    # tie, would then round differently from device to device and from kernel to kernel.
    scales = largest / torch.full_like(largest, INT8_MAX)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.round(groups / scales).to(torch.int8).view(x.shape), scales.squeeze(2)


def quantize_tokens_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantization of each row to E4M3: divide by ``amax / 448``, saturate and round to nearest even.

    x: float [M, K]. Returns float8_e4m3fn [M, K] and the float32 scales [M, 1], ``x ≈ values * scales``. A row of zeros
    gets scale 1; a NaN stays a NaN, and a row with an infinity has one.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    # Divided by a tensor, not by a constant: see `quantize_tokens`.
    scales = largest / torch.full_like(largest, FP8_MAX)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (wide / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack uint8 [N, K / 2] to uint8 [N, K] in 0..15. Byte j contains element 2 j in its low half, 2 j + 1 in its
    high."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)


def pack_int4(values: Tensor) -> Tensor:
    """Pack uint8 [N, K] in 0..15 to uint8 [N, K / 2]. This is the inverse of `unpack_int4`."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def dequantize_int4(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return ``(q - zero) * scale``, float32 [N, K]. scales, zeros: [N, K / group_size]."""
    values = unpack_int4(packed).float()
    groups = values.view(values.shape[0], scales.shape[1], -1)
    return ((groups - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(1)


def dequantize_groups(values: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """Return ``q * scale - minimum``, float32 [N, K]. values: int8 [N, K]; scales, minimums: float32 [N, G]."""
    groups = values.float().view(len(values), scales.shape[1], -1) * scales.unsqueeze(-1)
    return (groups if minimums is None else groups - minimums.unsqueeze(-1)).flatten(1)


def zero_points(values: Tensor, scales: Tensor, minimums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write ``q * scale - minimum`` as ``(q - zero) * scale``; return values, scales and zero points.

    values: uint8 [N, K]; scales, minimums: float32 [N, G]. A constant group has scale 0, so another scale is chosen for
    it: q becomes 0, the scale the minimum, and the zero point 1.
    """
    constant = scales == 0
    scales = torch.where(constant, torch.where(minimums == 0, 1, minimums), scales)
    values = values.view(*scales.shape, -1).masked_fill(constant.unsqueeze(2), 0).flatten(1)
    return values, scales, minimums / scales


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    """Compute root mean square normalization over the last dimension (Zhang & Sennrich 2019).

    It is computed in float32, or in float64 for float64, and rounded to the dtype of x before the multiplication by the
    weight.

    one_plus: whether the factor is ``1 + weight`` instead, and the product is rounded once, at the end (Gemma)
    """
    wide = widened(x)
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if one_plus:
        return (normalized * (1.0 + widened(weight))).to(x.dtype)
    return weight * normalized.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions (Su et al. 2021). x: [R, heads, D]; cos, sin: float32 [R, D]."""
    wide = widened(x)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x as float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
