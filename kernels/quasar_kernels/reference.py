"""Plain PyTorch definition of every op: slow, obvious, and the oracle of all tests."""

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
    ``x ≈ values * scales``. Values lie in [-127, 127]; zeros alone get scale 1.
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


def linear_w8a16(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with int8 weights and activations in the dtype of x; shapes as in `linear_w8a8`."""
    out = (x.double() @ values.double().T * scales.double()).float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w4a16(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with group-wise 4-bit weights and activations in the dtype of x.

    x: float [M, K]; packed: uint8 [N, K / 2]; scales, zeros: [N, K / group_size]. Returns [M, N] in x's dtype.
    """
    weight = dequantize_int4(packed, scales, zeros)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with 4-bit weights and int8 activations, both scaled by group: of a token's activations too, as
    weights of a group share a scale anyway.

    Within a group the sum of ``token * q`` is an exact integer; groups are then scaled and added in float32,
    in ascending order. Shapes as in `linear_w4a16`.
    """
    tokens = quantize_tokens(x, x.shape[1] // scales.shape[1])
    return linear_w4a8_quantized(*tokens, packed, scales, zeros, bias).to(x.dtype)


def linear_w4a8_quantized(
    tokens: Tensor, token_scales: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear_w4a8` of activations that are quantized already, int8 [M, K] and float32 [M, K / group_size]; returns
    float32."""
    rows, groups = scales.shape
    token_groups = tokens.double().view(len(tokens), groups, -1)
    weight_groups = unpack_int4(packed).double().view(rows, groups, -1)
    out = torch.zeros(len(tokens), rows, dtype=torch.float32, device=tokens.device)
    for group in range(groups):
        dot = token_groups[:, group] @ weight_groups[:, group].T
        offset = token_groups[:, group].sum(1, keepdim=True) * zeros[:, group].double()
        out += (dot - offset).float() * (token_scales[:, group : group + 1] * scales[:, group].float())
    return out if bias is None else out + bias.float()


def linear_bf16(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with 16-bit or float32 weights, summed in float32. x: [M, K]; values: [N, K]."""
    return F.linear(x.float(), values.float(), None if bias is None else bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalization over the last dimension (Zhang & Sennrich 2019), computed in float32."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, Shazeer 2020). gate_up: [M, 2 S], the gates first; returns [M, S]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions (Su et al. 2021). x: [R, heads, D]; cos, sin: float32 [R, D]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def rotary_write(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    start: int = 0,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotated queries [R, H, D] of a fused projection [R, (H + 2 H_kv) * D]; rotated keys and values are stored.

    keys, values: [H_kv, capacity, D], written from slot ``start`` on; norms: weights [D] of `rms_norm` over each
    query and each key head, or None.
    """
    kv_heads, _, head_dim = keys.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    keys[:, start : start + len(qkv)] = rotate(k, *rotation).transpose(0, 1)
    values[:, start : start + len(qkv)] = v.transpose(0, 1)
    return rotate(q, *rotation)


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


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMS normalization of ``x + residual`` (Zhang & Sennrich 2019), rounded where the model rounds.

    x, residual: float [M, K]; weight: [K]. Returns the normalized rows and the sum, both [M, K] in the dtype of x.
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def add_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm`, then `quantize_tokens`: int8 [M, K], float32 scales [M, G] and the sum that was normalized."""
    normalized, total = add_rms_norm(x, weight, eps, residual)
    return *quantize_tokens(normalized, group_size), total


def silu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """`silu_mul`, then `quantize_tokens`: int8 [M, S] and float32 scales [M, G]."""
    return quantize_tokens(silu_mul(gate_up), group_size)


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
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    slots = start + torch.arange(rows, device=qkv.device)
    keys.index_copy_(1, slots, rotate(k, cos, sin).transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
    return rotate(q, cos, sin)


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
