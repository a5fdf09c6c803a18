"""Between the QKV projection and attention: head normalization, rotary embedding, writing keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.slots import QuantizedSlots, Slots
from quasar_kernels.triton.slots import hadamard_transform, slot_constants, store_slot


def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
) -> Tensor:
    """Compute `ops.rotary_write.rotary_write`; ``start`` is read on the device. Returns the queries [R, H, D]."""
    rows, head_dim = len(qkv), cos.shape[1]
    kv_heads = len(keys)
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    queries = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    grid = (rows, heads + 2 * kv_heads)
    weights = cos if q_norm is None else q_norm, cos if k_norm is None else k_norm
    sizes = start, eps, heads, kv_heads
    norm = {
        "NORM": q_norm is not None,
        "ONE_PLUS": one_plus,
        "WHOLE": q_norm is not None and len(q_norm) != head_dim,
    }
    if isinstance(keys, QuantizedSlots):
        assert isinstance(values, QuantizedSlots)
        slots = keys.codes, values.codes, keys.scales, values.scales
        capacity = keys.codes.stride(0) // keys.codes.shape[2]
        constants = slot_constants(head_dim, keys.bits)
        rotary_quantize_kernel[grid](
            qkv, cos, sin, *weights, queries, *slots, *sizes, capacity, **norm, **constants, num_warps=1
        )
    else:
        assert isinstance(values, Tensor)
        half = triton.next_power_of_2(head_dim // 2)
        head_stride = keys.stride(0)
        rotary_write_kernel[grid](
            *(qkv, cos, sin, *weights, queries, keys, values, *sizes, head_stride),
            HEAD_DIM=head_dim,
            HALF=half,
            **norm,
            num_warps=1,
        )
    return queries


@triton.jit
def head_norm(head, heads, kv_heads, q_norm, k_norm, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Return a pointer to the weights of a query or key head, its number among its kind, and the heads of its mean.

    WHOLE: whether the weights are those of all heads, and so is the mean
    """
    weight, own, count = q_norm, head, heads
    if head >= heads:
        weight, own, count = k_norm, head - heads, kv_heads
    if WHOLE:
        weight += own * HEAD_DIM
    else:
        count = 1
    return weight, own, count


@triton.jit
def normalized(x, factor, weight, dtype: tl.constexpr, ONE_PLUS: tl.constexpr):
    """Return the elements of a head times their factor and weights, rounded to a dtype as separate operations are."""
    weight = weight.to(tl.float32)
    x = x * factor * (1.0 + weight) if ONE_PLUS else (x * factor).to(dtype).to(tl.float32) * weight
    return x.to(dtype).to(tl.float32)


@triton.jit
def rotary_write_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    queries,
    keys,
    values,
    start,
    eps,
    heads,
    kv_heads,
    head_stride,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Grid: (rows, query, key and value heads). A program computes both halves of a head; rotation mixes them."""
    dtype = qkv.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    low = tl.arange(0, HALF)
    high = low + HEAD_DIM // 2
    inside = low < HEAD_DIM // 2
    source = qkv + (row * (heads + 2 * kv_heads) + head) * HEAD_DIM
    first = tl.load(source + low, mask=inside, other=0.0)
    second = tl.load(source + high, mask=inside, other=0.0)
    slot = (tl.load(start) + row) * HEAD_DIM
    if head >= heads + kv_heads:
        place = values + (head - heads - kv_heads).to(tl.int64) * head_stride + slot
        tl.store(place + low, first, mask=inside)
        tl.store(place + high, second, mask=inside)
    else:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            weight, own, count = head_norm(head, heads, kv_heads, q_norm, k_norm, HEAD_DIM, WHOLE)
            squares = tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)
            if WHOLE:
                squares = 0.0
                for other in range(count):
                    head_of_all = source + (other - own) * HEAD_DIM
                    c = tl.load(head_of_all + low, mask=inside, other=0.0).to(tl.float32)
                    d = tl.load(head_of_all + high, mask=inside, other=0.0).to(tl.float32)
                    squares += tl.sum(c * c, axis=0) + tl.sum(d * d, axis=0)
            factor = 1.0 / tl.sqrt_rn(squares / (count * HEAD_DIM) + eps)
            a = normalized(a, factor, tl.load(weight + low, mask=inside, other=0.0), dtype, ONE_PLUS)
            b = normalized(b, factor, tl.load(weight + high, mask=inside, other=0.0), dtype, ONE_PLUS)
        cos_low = tl.load(cos + row * HEAD_DIM + low, mask=inside, other=0.0)
        cos_high = tl.load(cos + row * HEAD_DIM + high, mask=inside, other=0.0)
        sin_low = tl.load(sin + row * HEAD_DIM + low, mask=inside, other=0.0)
        sin_high = tl.load(sin + row * HEAD_DIM + high, mask=inside, other=0.0)
        rotated_low = (a * cos_low - b * sin_low).to(dtype)
        rotated_high = (b * cos_high + a * sin_high).to(dtype)
        place = queries + (row * heads + head) * HEAD_DIM
        if head >= heads:
            place = keys + (head - heads).to(tl.int64) * head_stride + slot
        tl.store(place + low, rotated_low, mask=inside)
        tl.store(place + high, rotated_high, mask=inside)


@triton.jit
def rotary_quantize_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    start,
    eps,
    heads,
    kv_heads,
    capacity,
    NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid: (rows, query, key and value heads). A program computes a whole head, because all of it shares scales."""
    dtype = qkv.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    depth = tl.arange(0, BLOCK_DIM)
    inside = depth < HEAD_DIM
    source = qkv + (row * (heads + 2 * kv_heads) + head) * HEAD_DIM
    x = tl.load(source + depth, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(start) + row
    if head >= heads + kv_heads:
        place = (head - heads - kv_heads).to(tl.int64) * capacity + slot
        store_slot(x, values, value_scales, place, BITS, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS)
    else:
        # Rotation mixes each element with the one half a head away.
        partner = tl.where(depth < HEAD_DIM // 2, depth + HEAD_DIM // 2, depth - HEAD_DIM // 2)
        y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            weight, own, count = head_norm(head, heads, kv_heads, q_norm, k_norm, HEAD_DIM, WHOLE)
            squares = tl.sum(x * x, axis=0)
            if WHOLE:
                squares = 0.0
                for other in range(count):
                    z = tl.load(source + (other - own) * HEAD_DIM + depth, mask=inside, other=0.0).to(tl.float32)
                    squares += tl.sum(z * z, axis=0)
            factor = 1.0 / tl.sqrt_rn(squares / (count * HEAD_DIM) + eps)
            x = normalized(x, factor, tl.load(weight + depth, mask=inside, other=0.0), dtype, ONE_PLUS)
            y = normalized(y, factor, tl.load(weight + partner, mask=inside, other=0.0), dtype, ONE_PLUS)
        y = tl.where(depth < HEAD_DIM // 2, -y, y)
        cosines = tl.load(cos + row * HEAD_DIM + depth, mask=inside, other=0.0)
        sines = tl.load(sin + row * HEAD_DIM + depth, mask=inside, other=0.0)
        rotated = (x * cosines + y * sines).to(dtype).to(tl.float32)
        spread = hadamard_transform(rotated, HEAD_DIM, BLOCK_DIM)
        if head >= heads:
            place = (head - heads).to(tl.int64) * capacity + slot
            store_slot(spread, keys, key_scales, place, BITS, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS)
        else:
            tl.store(queries + (row * heads + head) * HEAD_DIM + depth, spread.to(dtype), mask=inside)
