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
    return linear_w8a8_quantized(*quantize_tokens(x), values, scales, bias).to(x.dtype)


def linear_w8a8_quantized(
    tokens: Tensor, token_scales: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear_w8a8` of activations that are quantized already, int8 [M, K] and float32 [M, 1]; returns float32."""
    # float64 holds every int32 sum exactly, whatever the order of the additions.
    accumulated = tokens.double() @ values.double().T
    out = accumulated.float() * (token_scales * scales.float())
    return out if bias is None else out + bias.float()


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
    return linear_w4a8_quantized(*quantize_tokens(x), packed, scales, zeros, bias).to(x.dtype)


def linear_w4a8_quantized(
    tokens: Tensor, token_scales: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear_w4a8` of activations that are quantized already, int8 [M, K] and float32 [M, 1]; returns float32."""
    rows, groups = scales.shape
    token_groups = tokens.double().view(len(tokens), groups, -1)
    weight_groups = unpack_int4(packed).double().view(rows, groups, -1)
    out = torch.zeros(len(tokens), rows, dtype=torch.float32, device=tokens.device)
    for group in range(groups):
        dot = token_groups[:, group] @ weight_groups[:, group].T
        offset = token_groups[:, group].sum(1, keepdim=True) * zeros[:, group].double()
        out += (dot - offset).float() * scales[:, group].float()
    out = out * token_scales
    return out if bias is None else out + bias.float()


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMS normalization of ``x + residual`` (Zhang & Sennrich 2019), rounded where the model rounds.

    x, residual: float [M, K]; weight: [K]. Returns the normalized rows and the sum, both [M, K] in the dtype of x.
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype), total


def add_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm`, its rows quantized: int8 [M, K], float32 scales [M, 1] and the sum that was normalized."""
    normalized, total = add_rms_norm(x, weight, eps, residual)
    return *quantize_tokens(normalized), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """The element-wise part of SwiGLU (Shazeer 2020). gate_up: float [M, 2 I], gate first; returns [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul`, its rows quantized: int8 [M, I] and float32 scales [M, 1]."""
    return quantize_tokens(silu_mul(gate_up))


def rotary_write_at(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Split a QKV projection, normalize and rotate its queries and keys, and write keys and values to the cache.

    qkv: float [R, (H + 2 H_kv) D], query heads first; cos, sin: float32 [R, D], halves repeated; keys, values:
    [H_kv, capacity, D], written at slots ``start`` on (int64 [1]); q_norm, k_norm: [D] or None, RMS normalization
    of heads. Returns the queries [R, H, D].
    """
    rows, head_dim = len(qkv), cos.shape[1]
    heads = qkv.view(rows, -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * len(keys), len(keys), len(keys)], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = add_rms_norm(q, q_norm, eps)[0], add_rms_norm(k, k_norm, eps)[0]
    slots = start + torch.arange(rows, device=qkv.device)
    keys.index_copy_(1, slots, _rotate(k, cos, sin).transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
    return _rotate(q, cos, sin)


def block_attention(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor) -> Tensor:
    """Attention of a block over the cached context and itself.

    q: float [R, H, D]; keys, values: [H_kv, capacity, D], the block's own rows at slots ``start`` (int64 [1]) on;
    block_mask: bool [R, R], True where a row sees a row of the block; every row sees every slot below ``start``.
    Query head h reads KV head h // (H / H_kv). Returns [R, H D] in the dtype of q.
    """
    rows, heads, head_dim = q.shape
    end = int(start) + rows
    visible = F.pad(block_mask.bool(), (end - rows, 0), value=True)
    group = heads // len(keys)
    k, v = (stored[:, :end].double().repeat_interleave(group, dim=0) for stored in (keys, values))
    logits = q.double().transpose(0, 1) @ k.transpose(1, 2) * head_dim**-0.5
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(rows, heads * head_dim).to(q.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)
