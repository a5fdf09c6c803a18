"""Definitions in PyTorch's own operations that several ops use: int8 and int4, norms, rotation."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
UINT4_MAX = 15
SLOT_GROUP = 32
"""Elements of a key or value in 4 bit that share a scale and a minimum."""
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


def quantize_slots(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize keys or values to 8 or 4 bit, every token and head by itself.

    x: float [..., D]. Returns codes and scales, with which `dequantize_slots` gives x again:

    - 8 bit, symmetric: int8 [..., D] in [-127, 127], and one scale per row, float32 [..., 1]
    - 4 bit, asymmetric: uint8 [..., D / 2] as in `pack_int4`, and for every `slot_groups` group of elements its scale
      and its minimum, float16 [..., 2 G]; codes are relative to the rounded scale and minimum

    A row or group of equal elements gets scale 1 where it would be 0. If an element is NaN or infinite, the dequantized
    row or group is not finite either.
    """
    wide = x.float()
    if bits == 8:
        largest = wide.abs().amax(dim=-1, keepdim=True)
        # Divided by a tensor, not by a constant: see `quantize_tokens`.
        scales = _nonzero(largest / torch.full_like(largest, INT8_MAX))
        return torch.round(wide / scales).nan_to_num(0).to(torch.int8), scales
    groups = wide.unflatten(-1, (slot_groups(x.shape[-1]), -1))
    minimums, largest = groups.aminmax(dim=-1, keepdim=True)
    scales = _nonzero(((largest - minimums) / torch.full_like(largest, UINT4_MAX)).half())
    minimums = minimums.half()
    steps = torch.round((groups - minimums.float()) / scales.float()).nan_to_num(0).clamp(0, UINT4_MAX)
    codes = steps.to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), torch.cat([scales, minimums], dim=-1).flatten(-2)


def dequantize_slots(codes: Tensor, scales: Tensor) -> Tensor:
    """Return ``code * scale`` or ``code * scale + minimum``, float32 [..., D], for results of `quantize_slots`."""
    if codes.dtype == torch.int8:
        return codes.float() * scales
    values = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2).float()
    scale, minimum = scales.float().unflatten(-1, (-1, 2)).split(1, dim=-1)
    return (values.unflatten(-1, (scale.shape[-2], -1)) * scale + minimum).flatten(-2)


def slot_groups(head_dim: int) -> int:
    """Return the number of groups of a head in 4 bit: of 32 elements, or one group if 32 does not divide the head."""
    return 1 if head_dim % SLOT_GROUP else head_dim // SLOT_GROUP


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def hadamard_transform(x: Tensor) -> Tensor:
    """Multiply the last dimension by Sylvester's Hadamard matrix H / sqrt(n), which is its own inverse.

    n is the largest power of two that divides the dimension; consecutive blocks of n elements are transformed. It is
    computed in float32 (in float64 for float64) by butterflies of growing distance, in this order, which is the one of
    the kernels, and returned in that dtype.

    >>> hadamard_transform(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    size = x.shape[-1]
    order = size & -size
    wide = widened(x)
    distance = 1
    while distance < order:
        low, high = wide.unflatten(-1, (-1, 2, distance)).unbind(-2)
        wide = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        distance *= 2
    return wide * order**-0.5


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
