"""A second definition of every op of `quasar_kernels`, in float64, which all backends are compared with.

Nothing here calls the package. Integers of quantized activations come in as they are: their format, a float32 scale per
token or group, is part of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quasar_kernels import AttentionOptions


def int4_values(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2], element 2 j in the low half of byte j, as float64 [N, K] in 0..15."""
    values = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.float64, device=packed.device)
    values[:, 0::2], values[:, 1::2] = packed % 16, packed // 16
    return values


def dequantized(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float64 [N, K] of ``(q - zero) * scale``; scales, zeros: [N, G]."""
    size = 2 * packed.shape[1] // scales.shape[1]
    spread = (part.double().repeat_interleave(size, dim=1) for part in (zeros, scales))
    zero, scale = spread
    return (int4_values(packed) - zero) * scale


def dequantized_groups(values: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """float64 [N, K] of ``q * scale - minimum``; scales, minimums: [N, G]."""
    size = values.shape[1] // scales.shape[1]
    out = values.double() * scales.double().repeat_interleave(size, dim=1)
    return out if minimums is None else out - minimums.double().repeat_interleave(size, dim=1)


def linear(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in the dtype of x."""
    out = x.double() @ values.double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def linear_w8a8(
    tokens: Tensor, token_scales: Tensor, dtype: torch.dtype, values: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Round exact int8 sums to float32, apply scale and bias in float32, and round to ``dtype``.

    token_scales: [M, G]; with several groups their sums are scaled and added in float32 in ascending order.
    """
    groups = token_scales.shape[1]
    if groups == 1:
        out = (tokens.double() @ values.double().T).float() * (token_scales * scales)
    else:
        out = torch.zeros(len(tokens), len(values), device=tokens.device)
        parts = zip(tokens.chunk(groups, dim=1), values.chunk(groups, dim=1), strict=True)
        for group, (inputs, weights) in enumerate(parts):
            out += (inputs.double() @ weights.double().T).float() * token_scales[:, group, None]
        out *= scales
    return (out if bias is None else out + bias.float()).to(dtype)


def linear_int8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matmul of int8 weights that have a scale per row with activations that are not quantized."""
    return linear(x, values.double() * scales.double().unsqueeze(1), bias)


def linear_int4(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """4-bit weights in groups; activations as they are."""
    return linear(x, dequantized(packed, scales, zeros), bias)


def linear_w4a8(
    tokens: Tensor,
    token_scales: Tensor,
    dtype: torch.dtype,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """Round the exact sums of groups to float32, then scale and add them in float32 in ascending order."""
    packed, scales, zeros = weight
    size = tokens.shape[1] // scales.shape[1]
    shifted = int4_values(packed) - zeros.double().repeat_interleave(size, dim=1)
    out = torch.zeros(len(tokens), len(packed), device=tokens.device)
    for group in range(scales.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        sums = (tokens[:, inputs].double() @ shifted[:, inputs].T).float()
        out += sums * (token_scales[:, group, None] * scales[:, group])
    return (out if bias is None else out + bias.float()).to(dtype)


def quantized(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 [M, G]: the largest magnitude of a group becomes 127, ties go to the even integer."""
    groups = x.float().unflatten(1, (-1, group_size or x.shape[1]))
    largest = groups.abs().amax(2).double()
    scales = torch.where(largest > 0, largest / 127, 1.0).float()
    return (groups / scales.unsqueeze(2)).round().to(torch.int8).flatten(1), scales


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    wide = x.double()
    factor = weight.double() + 1 if one_plus else weight.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * factor


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().tensor_split(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """GELU by its approximation with tanh (Hendrycks & Gimpel 2016, section 2)."""
    gate, up = gate_up.double().tensor_split(2, dim=-1)
    return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads. x: [R, heads, D]; cos, sin: [R, D]. Element j is paired with element j + D / 2."""
    half, wide = x.shape[2] // 2, x.double()
    low, high = wide[..., :half], wide[..., half:]
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    out = torch.empty_like(wide)
    out[..., :half] = low * c[..., :half] - high * s[..., :half]
    out[..., half:] = high * c[..., half:] + low * s[..., half:]
    return out


def rotary_write(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    start: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [R, H, D] and the cache's keys and values after the write, all in float64."""
    keys, values = (part.double().clone() for part in cache)
    kv_heads, _, head_dim = keys.shape
    rows = len(qkv)
    heads = qkv.double().unflatten(1, (-1, head_dim))
    count = heads.shape[1] - 2 * kv_heads
    q, k, v = heads[:, :count], heads[:, count : count + kv_heads], heads[:, count + kv_heads :]
    if norms is not None:
        # A weight has the size of a head, or of all heads, which are then normalized together.
        q, k = (
            rms_norm(part.reshape(rows, -1, len(weight)), weight, eps, one_plus).view(part.shape)
            for part, weight in zip((q, k), norms, strict=True)
        )
    keys[:, start : start + rows] = rotated(k, *rotation).transpose(0, 1)
    values[:, start : start + rows] = v.transpose(0, 1)
    return rotated(q, *rotation), keys, values


def attention(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, options: AttentionOptions | None = None
) -> Tensor:
    """q: [R, H, D]; keys, values: [H_kv, capacity, D]; visible: bool [R, S]. Returns float64 [R, H D]."""
    scale = None if options is None else options.scale
    softcap = None if options is None else options.softcap
    rows, heads, head_dim = q.shape
    slots, group = visible.shape[1], heads // len(keys)
    out = torch.empty(rows, heads, head_dim, dtype=torch.float64, device=q.device)
    for head in range(heads):
        k, v = (stored[head // group, :slots].double() for stored in (keys, values))
        logits = q[:, head].double() @ k.T * (scale or 1 / head_dim**0.5)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        out[:, head] = torch.softmax(logits.masked_fill(~visible, -torch.inf), dim=1) @ v
    return out.flatten(1)


def block_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    block_mask: Tensor,
    options: AttentionOptions | None = None,
) -> Tensor:
    """Compute `attention` of a block that attends to all slots below ``start`` and to the rows that the mask allows.

    With a window, every row attends only to the last slots of its branch.
    """
    everything = torch.ones(len(q), start, dtype=torch.bool, device=q.device)
    visible = torch.cat([everything, block_mask.bool()], dim=1)
    if options is not None and options.window is not None:
        for row in visible:
            row[row.nonzero().flatten()[: -options.window]] = False
    return attention(q, keys, values, visible, options)


def ancestors(parents: Sequence[int]) -> Tensor:
    """Return the mask of a tree, bool [R, R]: every node attends to itself and its ancestors. A root has parent -1."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def hadamard(x: Tensor) -> Tensor:
    """Multiply by Sylvester's matrix: its element i, j is -1 to the number of ones that i and j share in binary.

    Consecutive blocks of the largest power of two that divides the last dimension are transformed, in float64.
    """
    order = 1
    while x.shape[-1] % (2 * order) == 0:
        order *= 2
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    matrix = torch.tensor(signs, dtype=torch.float64, device=x.device) / order**0.5
    return (x.double().unflatten(-1, (-1, order)) @ matrix).flatten(-2)


def quantized_slot(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return what a key or value [D] is after quantization, and half a step of each element, both in float64.

    8 bit: multiples of largest magnitude / 127. 4 bit: 15 steps from the minimum of every 32 elements (of all where 32
    does not divide D) to their maximum, step and minimum in float16.
    """
    wide, size = x.double(), len(x)
    if bits == 8:
        step = (wide.abs().max() / 127).float().double()
        return (wide / step).round() * step, (step / 2).expand(size)
    found, halves = [], []
    for group in wide.split(32 if size % 32 == 0 else size):
        step = ((group.max() - group.min()).float() / 15).half().double()
        least = group.min().half().double()
        found.append(((group - least) / step).round().clamp(0, 15) * step + least)
        halves.append((step / 2).expand(len(group)))
    return torch.cat(found), torch.cat(halves)
