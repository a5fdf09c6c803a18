"""Plain PyTorch definition of every op: slow, obvious, and the oracle of all tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic quantization of each row to int8.

    x: float [M, K]. Returns int8 [M, K] and the float32 scales [M, 1], ``x ≈ values * scales``. Values lie in
    [-127, 127]; a row of zeros gets scale 1.
    """
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True) / INT8_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.round(x / scales).to(torch.int8), scales


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


def linear_w8a8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with int8 weights and activations, exact int32 accumulation.

    x: float [M, K]; values: int8 [N, K]; scales: float32 [N]; bias: [N]. Returns [M, N] in the dtype of x.
    """
    tokens, token_scales = quantize_tokens(x)
    # float64 holds every int32 sum exactly, whatever the order of the additions.
    accumulated = tokens.double() @ values.double().T
    out = accumulated.float() * (token_scales * scales.float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w4a16(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights and activations in the dtype of x.

    x: float [M, K]; packed: uint8 [N, K / 2]; scales, zeros: [N, K / group_size]. Returns [M, N] in x's dtype.
    """
    weight = dequantize_int4(packed, scales, zeros)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights and per-token int8 activations.

    Within a group the sum of ``token * q`` is an exact integer; groups are then scaled and added in float32,
    in ascending order. Shapes as in `linear_w4a16`.
    """
    tokens, token_scales = quantize_tokens(x)
    rows, groups = scales.shape
    token_groups = tokens.double().view(len(x), groups, -1)
    weight_groups = unpack_int4(packed).double().view(rows, groups, -1)
    out = torch.zeros(len(x), rows, dtype=torch.float32, device=x.device)
    for group in range(groups):
        dot = token_groups[:, group] @ weight_groups[:, group].T
        offset = token_groups[:, group].sum(1, keepdim=True) * zeros[:, group].double()
        out += (dot - offset).float() * scales[:, group].float()
    out = out * token_scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_bf16(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with 16-bit or float32 weights, summed in float32. x: [M, K]; values: [N, K]."""
    return F.linear(x.float(), values.float(), None if bias is None else bias.float()).to(x.dtype)
