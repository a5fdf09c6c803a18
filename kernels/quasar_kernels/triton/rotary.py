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
    if isinstance(keys, QuantizedSlots):
        assert isinstance(values, QuantizedSlots)
        rotary_quantize_kernel[(rows, heads + 2 * kv_heads)](
            qkv,
            cos,
            sin,
            cos if q_norm is None else q_norm,
            cos if k_norm is None else k_norm,
            queries,
            keys.codes,
            values.codes,
            keys.scales,
            values.scales,
            start,
            eps,
            heads,
            kv_heads,
            keys.codes.stride(0) // keys.codes.shape[2],
            NORM=q_norm is not None,
            ONE_PLUS=one_plus,
            WHOLE=q_norm is not None and len(q_norm) != head_dim,
            **slot_constants(head_dim, keys.bits),
            num_warps=1,
        )
        return queries
    assert isinstance(values, Tensor)
    rotary_write_kernel[(rows, heads + 2 * kv_heads)](
        qkv,
        cos,
        sin,
        cos if q_norm is None else q_norm,
        cos if k_norm is None else k_norm,
        queries,
        keys,
        values,
        start,
        eps,
        heads,
        kv_heads,
        keys.stride(0),
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        NORM=q_norm is not None,
        ONE_PLUS=one_plus,
        WHOLE=q_norm is not None and len(q_norm) != head_dim,
        num_warps=1,
    )
    return queries


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
            weight = q_norm
            if head >= heads:
                weight = k_norm
            squares = tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)
            count = 1
            if WHOLE:
                # The weights are those of all heads, and so is the mean.
                own, count = head, heads
                if head >= heads:
                    own, count = head - heads, kv_heads
                weight += own * HEAD_DIM
                squares = 0.0
                for other in range(count):
                    head_of_all = source + (other - own) * HEAD_DIM
                    c = tl.load(head_of_all + low, mask=inside, other=0.0).to(tl.float32)
                    d = tl.load(head_of_all + high, mask=inside, other=0.0).to(tl.float32)
                    squares += tl.sum(c * c, axis=0) + tl.sum(d * d, axis=0)
            factor = 1.0 / tl.sqrt_rn(squares / (count * HEAD_DIM) + eps)
            low_weight = tl.load(weight + low, mask=inside, other=0.0).to(tl.float32)
            high_weight = tl.load(weight + high, mask=inside, other=0.0).to(tl.float32)
            if ONE_PLUS:
                a, b = a * factor * (1.0 + low_weight), b * factor * (1.0 + high_weight)
            else:
                a = (a * factor).to(dtype).to(tl.float32) * low_weight
                b = (b * factor).to(dtype).to(tl.float32) * high_weight
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
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
            weight = q_norm
            if head >= heads:
                weight = k_norm
            squares = tl.sum(x * x, axis=0)
            count = 1
            if WHOLE:
                # The weights are those of all heads, and so is the mean.
                own, count = head, heads
                if head >= heads:
                    own, count = head - heads, kv_heads
                weight += own * HEAD_DIM
                squares = 0.0
                for other in range(count):
                    z = tl.load(source + (other - own) * HEAD_DIM + depth, mask=inside, other=0.0).to(tl.float32)
                    squares += tl.sum(z * z, axis=0)
            factor = 1.0 / tl.sqrt_rn(squares / (count * HEAD_DIM) + eps)
            x_weight = tl.load(weight + depth, mask=inside, other=0.0).to(tl.float32)
            y_weight = tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
            if ONE_PLUS:
                x, y = x * factor * (1.0 + x_weight), y * factor * (1.0 + y_weight)
            else:
                x = (x * factor).to(dtype).to(tl.float32) * x_weight
                y = (y * factor).to(dtype).to(tl.float32) * y_weight
            x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
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
