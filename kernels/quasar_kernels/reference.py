"""Definitions in PyTorch's own operations that several ops share: int8 and int4, norms, rotation, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127
# Float32 is the mode in which exactness is asserted. There, attention of blocks up to this size accumulates in
# float64, so that a row's result does not depend on how many other rows share its block: an int8 activation
# quantizer behind it would turn a difference in the last bit into a different integer.
EXACT_BLOCK = 128


def quantize_tokens(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic quantization of each row, or of each group of ``group_size`` elements of a row, to int8.

    x: float [M, K]. Returns int8 [M, K] and the float32 scales [M, K / group_size] ([M, 1] without groups),
    ``x ≈ values * scales``. Values lie in [-127, 127]; a row or group of zeros gets scale 1.
    """
    size = group_size or x.shape[1]
    groups = x.float().view(len(x), x.shape[1] // size, size)
    largest = groups.abs().amax(dim=2, keepdim=True)
    # By a number, CUDA would multiply with the rounded reciprocal: half the largest value of a row, a tie, would then
    # round differently from device to device and from kernel to kernel.
    scales = largest / torch.full_like(largest, INT8_MAX)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.round(groups / scales).to(torch.int8).view(x.shape), scales.squeeze(2)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] with element 2 j in the low and 2 j + 1 in the high half of byte j -> uint8 [N, K] in 0..15."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)


def pack_int4(values: Tensor) -> Tensor:
    """Inverse of `unpack_int4`: uint8 [N, K] in 0..15 -> uint8 [N, K / 2]."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def dequantize_int4(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 [N, K] of ``(q - zero) * scale``, scales and zeros [N, K / group_size]."""
    values = unpack_int4(packed).float()
    groups = values.view(values.shape[0], scales.shape[1], -1)
    return ((groups - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalization over the last dimension (Zhang & Sennrich 2019), computed in float32 or
    better, and rounded to the dtype of x before it is multiplied by the weight."""
    wide = widened(x)
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions (Su et al. 2021). x: [R, heads, D]; cos, sin: float32 [R, D]."""
    wide = widened(x)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of a block over the first S slots: q [R, H, D]; keys, values [H_kv, capacity, D]; visible bool
    [R, S]; returns [R, H * D].

    The H / H_kv query heads of a KV head are packed into rows, so that each key is read once.
    """
    keys, values = keys[:, : visible.shape[1]], values[:, : visible.shape[1]]
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    packed = q.transpose(0, 1).reshape(1, kv_heads, group * rows, head_dim)
    mask = visible.repeat(group, 1)
    if q.dtype == torch.float32 and rows <= EXACT_BLOCK:
        packed, keys, values = packed.double(), keys.double(), values.double()
    out = F.scaled_dot_product_attention(packed, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask)
    return out.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim).to(q.dtype)


def widened(x: Tensor) -> Tensor:
    """x as float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
