"""Keys and values in the slots of a KV cache: their quantization, and their loading in 16, 8 or 4 bit.

The formats are those of `reference.quantize_slots`. Slot s of head h is row h * capacity + s of codes and scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quasar_kernels.reference import SLOT_GROUP, slot_groups


def slot_constants(head_dim: int, bits: int) -> dict[str, int]:
    """Return the compile-time values of a format. GROUP: elements with their own scale, GROUPS: number of these."""
    block = max(16, triton.next_power_of_2(head_dim))
    group = SLOT_GROUP if bits == 4 and head_dim % SLOT_GROUP == 0 else block
    groups = slot_groups(head_dim) if bits == 4 else 1
    return {"BITS": bits, "HEAD_DIM": head_dim, "BLOCK_DIM": block, "GROUP": group, "GROUPS": groups}


@triton.jit
def load_slots(
    codes,
    scales,
    row,
    present,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return the rows [slots, BLOCK_DIM] in ``dtype``, 0 beyond the head.

    present: rows that exist, the others are 0 too; None if all do
    """
    if BITS == 4:
        values = load_4_bit(codes, scales, row, present, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS).to(dtype)
    else:
        depth = tl.arange(0, BLOCK_DIM)
        places = codes + row[:, None] * HEAD_DIM + depth[None, :]
        if present is None:
            if HEAD_DIM == BLOCK_DIM:
                values = tl.load(places)
            else:
                values = tl.load(places, mask=(depth < HEAD_DIM)[None, :], other=0)
        else:
            values = tl.load(places, mask=present[:, None] & (depth < HEAD_DIM)[None, :], other=0)
        if BITS == 8:
            scale = tl.load(scales + row) if present is None else tl.load(scales + row, mask=present, other=0.0)
            values = (values.to(tl.float32) * scale[:, None]).to(dtype)
    return values


@triton.jit
def load_4_bit(
    codes,
    scales,
    row,
    present,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return the rows of a 4-bit cache as `load_slots` does, in float32."""
    exists = row >= 0
    if present is not None:
        exists = present
    pair, group = tl.arange(0, BLOCK_DIM // 2), tl.arange(0, BLOCK_DIM // GROUP)
    whole = exists[:, None] & (pair < HEAD_DIM // 2)[None, :]
    packed = tl.load(codes + row[:, None] * (HEAD_DIM // 2) + pair[None, :], mask=whole, other=0)
    code = tl.interleave(packed & 15, packed >> 4).to(tl.float32)
    # A scale and its minimum are read as one number of 32 bits.
    place = scales.to(tl.pointer_type(tl.uint32)) + row[:, None] * GROUPS + group[None, :]
    both = tl.load(place, mask=exists[:, None] & (group < GROUPS)[None, :], other=0)
    scale = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    grouped = tl.reshape(code, [code.shape[0], BLOCK_DIM // GROUP, GROUP])
    values = tl.reshape(grouped * scale[:, :, None] + minimum[:, :, None], [code.shape[0], BLOCK_DIM])
    depth = tl.arange(0, BLOCK_DIM)
    return tl.where(exists[:, None] & (depth < HEAD_DIM)[None, :], values, 0.0)


@triton.jit
def store_slot(
    x,
    codes,
    scales,
    row,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Quantize a head, float32 [BLOCK_DIM], to the slot ``row``. The codes equal those of the reference."""
    depth = tl.arange(0, BLOCK_DIM)
    inside = depth < HEAD_DIM
    if BITS == 8:
        largest = tl.max(tl.abs(x), axis=0)
        # The maximum of the others is returned beside a NaN.
        broken = tl.max((x != x).to(tl.int32), axis=0) > 0
        scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, 127.0))
        scale = tl.where(broken, float("nan"), scale)
        tl.store(scales + row, scale)
        tl.store(codes + row * HEAD_DIM + depth, round_to_even(tl.div_rn(x, scale)).to(tl.int8), mask=inside)
    else:
        group = tl.arange(0, BLOCK_DIM // GROUP)
        least = tl.min(tl.reshape(tl.where(inside, x, float("inf")), [BLOCK_DIM // GROUP, GROUP]), axis=1)
        largest = tl.max(tl.reshape(tl.where(inside, x, float("-inf")), [BLOCK_DIM // GROUP, GROUP]), axis=1)
        # Groups beyond the head have no elements, and are not stored.
        least, largest = tl.where(group < GROUPS, least, 0.0), tl.where(group < GROUPS, largest, 0.0)
        grouped = tl.reshape(x, [BLOCK_DIM // GROUP, GROUP])
        broken = tl.max((grouped != grouped).to(tl.int32), axis=1) > 0
        scale = tl.div_rn(largest - least, 15.0).to(tl.float16).to(tl.float32)
        scale = tl.where(broken, float("nan"), tl.where(scale == 0, 1.0, scale))
        minimum = tl.where(broken, float("nan"), least.to(tl.float16).to(tl.float32))
        place = scales + row * (2 * GROUPS) + 2 * group
        tl.store(place, scale.to(tl.float16), mask=group < GROUPS)
        tl.store(place + 1, minimum.to(tl.float16), mask=group < GROUPS)
        steps = round_to_even(tl.div_rn(grouped - minimum[:, None], scale[:, None]))
        code = tl.reshape(tl.minimum(tl.maximum(steps, 0.0), 15.0).to(tl.uint8), [BLOCK_DIM // 2, 2])
        low, high = tl.split(code)
        pair = tl.arange(0, BLOCK_DIM // 2)
        tl.store(codes + row * (HEAD_DIM // 2) + pair, low | (high << 4), mask=pair < HEAD_DIM // 2)


@triton.jit
def hadamard_transform(x, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Compute `reference.hadamard_transform` of a head, float32 [BLOCK_DIM], with the same order of operations."""
    depth = tl.arange(0, BLOCK_DIM)
    order: tl.constexpr = HEAD_DIM & -HEAD_DIM
    for step in tl.static_range(16):
        if (1 << step) < order:
            partner = tl.gather(x, depth ^ (1 << step), 0)
            x = tl.where((depth & (1 << step)) == 0, x + partner, partner - x)
    return x * (order**-0.5)


@triton.jit
def round_to_even(x):
    # A float32 above 2^23 has no fraction, so adding and subtracting 1.5 * 2^23 rounds to an integer.
    return (x + 12582912.0) - 12582912.0
