"""Attention of a verification block. The context is split between programs, and their results are merged.

This is flash-decoding (Dao et al. 2023) for a block of rows. A program computes one KV head and a part of the slots.
The query heads of the KV head and the rows of the block are packed into one tile, so that each key is read once. The
parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.attention_options import PLAIN_ATTENTION, AttentionOptions
from quasar_kernels.slots import QuantizedSlots, Slots
from quasar_kernels.triton.device import interpreted, multiprocessors
from quasar_kernels.triton.dot import multiply
from quasar_kernels.triton.slots import load_slots, slot_constants
from quasar_kernels.triton.tuning import MAX_ROWS

BLOCK_SLOTS = 64
WIDE_HEAD = 128  # wider heads get half as many slots per tile, so that the tiles fit into shared memory
MAX_PACKED_ROWS = 32
MAX_SPLITS = 32
MERGE_ELEMENTS = 128


def block_attention(
    q: Tensor,
    keys: Slots,
    values: Slots,
    start: Tensor,
    block_mask: Tensor,
    options: AttentionOptions = PLAIN_ATTENTION,
    splits: int | None = None,
) -> Tensor:
    """Compute `ops.block_attention.block_attention`; ``start`` and the mask are read on the device. Returns [R, H * D].

    options: its window must not be shorter than the block
    splits: number of programs that share the context. The default depends only on the device and on the number of
        heads, so that a captured CUDA graph is valid for every context length
    """
    rows, heads, head_dim = q.shape
    kv_heads = len(keys)
    group = heads // kv_heads
    if splits is None:
        splits = min(MAX_SPLITS, max(1, multiprocessors(q.device) // kv_heads))
    key_codes, value_codes = (part.codes if isinstance(part, QuantizedSlots) else part for part in (keys, values))
    # The codes of a float cache stand in for scales that are not there.
    key_scales, value_scales = (part.scales if isinstance(part, QuantizedSlots) else part for part in (keys, values))
    constants, launch = attention_launch(rows, group, head_dim, keys.bits if isinstance(keys, QuantizedSlots) else 16)
    partial = torch.empty(splits, rows * heads, head_dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(2, splits, rows * heads, dtype=torch.float32, device=q.device)
    block_attention_kernel[(kv_heads, splits, triton.cdiv(group * rows, constants["BLOCK_ROWS"]))](
        q,
        key_codes,
        value_codes,
        key_scales,
        value_scales,
        start,
        block_mask,
        partial,
        statistics,
        (options.scale or head_dim**-0.5) * math.log2(math.e),
        # Logits are in units of log 2, and so is the cap.
        (options.softcap or 0.0) * math.log2(math.e),
        options.window or 0,
        rows,
        heads,
        splits,
        key_codes.stride(0) // key_codes.shape[2],
        CAPPED=options.softcap is not None,
        WINDOWED=options.window is not None,
        WIDE=interpreted(),
        **constants,
        **launch,
    )
    out = torch.empty(rows, heads * head_dim, dtype=q.dtype, device=q.device)
    merge_kernel[(rows, triton.cdiv(heads * head_dim, MERGE_ELEMENTS))](
        partial,
        statistics,
        out,
        rows * heads,
        heads * head_dim,
        SPLITS=splits,
        PADDED=triton.next_power_of_2(splits),
        HEAD_DIM=head_dim,
        BLOCK=MERGE_ELEMENTS,
        num_warps=4,
    )
    return out


def attention_launch(rows: int, group: int, head_dim: int, bits: int = 16) -> tuple[dict[str, int], dict[str, int]]:
    """Return compile-time values and launch options for ``rows`` rows with ``group`` query heads per KV head.

    bits: those of keys and values
    """
    # Codes are dequantized in registers, of which wide heads need too many.
    wide = head_dim > WIDE_HEAD or (bits != 16 and head_dim == WIDE_HEAD)
    constants = {
        "HEADS": group,
        **slot_constants(head_dim, bits),
        "BLOCK_ROWS": min(MAX_PACKED_ROWS, max(16, triton.next_power_of_2(group * rows))),
        "BLOCK_SLOTS": BLOCK_SLOTS // 2 if wide else BLOCK_SLOTS,
        "MASK_COLUMNS": MAX_ROWS,
    }
    return constants, {"num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["rows"])
def block_attention_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    start,
    block_mask,
    partial,
    statistics,
    scale,
    softcap,
    window,
    rows,
    heads,
    splits,
    capacity,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    """Compute the partial results. Grid: (KV heads, splits, blocks of packed rows).

    Packed row p is head p % HEADS of row p // HEADS. partial: unnormalized sums, float32 [splits, R * H, D];
    statistics: float32 [2, splits, R * H], the largest logit in units of log 2 and the sum of exponentials relative to
    it.
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    packed = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, head = packed // HEADS, kv_head * HEADS + packed % HEADS
    inside = row < rows
    depth = tl.arange(0, BLOCK_DIM)
    context = tl.load(start).to(tl.int32)
    end = context + rows
    oldest = 0  # no row attends to the slots before this one
    if WINDOWED:
        oldest = tl.maximum(context + 1 - window, 0) // BLOCK_SLOTS * BLOCK_SLOTS
        column = tl.arange(0, MASK_COLUMNS)
        column_inside = inside[:, None] & (column < rows)[None, :]
        branch = tl.load(block_mask + row[:, None] * rows + column[None, :], mask=column_inside, other=0) != 0
        # The position of a row is the number of slots of its branch before it.
        first_seen = context + tl.sum(branch.to(tl.int32), axis=1) - window
    share = tl.cdiv(tl.cdiv(end - oldest, splits), BLOCK_SLOTS) * BLOCK_SLOTS
    begin = oldest + split * share
    stop = tl.minimum(begin + share, end)
    # Every row attends to all slots before this one, so the mask is not read for them.
    middle = tl.minimum(tl.maximum(context // BLOCK_SLOTS * BLOCK_SLOTS, begin), stop)
    query_place = (row * heads + head)[:, None] * HEAD_DIM + depth[None, :]
    query = tl.load(q + query_place, mask=inside[:, None] & (depth[None, :] < HEAD_DIM), other=0.0)
    base = kv_head.to(tl.int64) * capacity
    dtype: tl.constexpr = q.dtype.element_ty
    largest = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    for first in range(begin, middle, BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        key = load_slots(keys, key_scales, base + slot, None, dtype, BITS, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS)
        value = load_slots(values, value_scales, base + slot, None, dtype, BITS, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS)
        logits = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], dtype=tl.float32)
        logits = multiply(query, tl.trans(key), logits, WIDE) * scale
        if CAPPED:
            logits = capped(logits, softcap)
        if WINDOWED:
            logits = tl.where(slot[None, :] >= first_seen[:, None], logits, float("-inf"))
        largest, total, accumulator = add_slots(logits, value, largest, total, accumulator, WIDE)
    for first in tl.range(middle, stop, BLOCK_SLOTS, num_stages=1):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        present = slot < end
        key = load_slots(keys, key_scales, base + slot, present, dtype, BITS, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS)
        value = load_slots(values, value_scales, base + slot, present, dtype, BITS, HEAD_DIM, BLOCK_DIM, GROUP, GROUPS)
        logits = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], dtype=tl.float32)
        logits = multiply(query, tl.trans(key), logits, WIDE) * scale
        own = slot[None, :] - context
        in_block = inside[:, None] & (own >= 0) & (own < rows)
        seen = tl.load(block_mask + row[:, None] * rows + own, mask=in_block, other=0) != 0
        if CAPPED:
            logits = capped(logits, softcap)
        logits = tl.where((own < 0) | seen, logits, float("-inf"))
        if WINDOWED:
            logits = tl.where((own >= 0) | (slot[None, :] >= first_seen[:, None]), logits, float("-inf"))
        largest, total, accumulator = add_slots(logits, value, largest, total, accumulator, WIDE)
    index = split * (rows * heads) + row * heads + head
    out_place = index.to(tl.int64)[:, None] * HEAD_DIM + depth[None, :]
    tl.store(partial + out_place, accumulator, mask=inside[:, None] & (depth[None, :] < HEAD_DIM))
    tl.store(statistics + index, largest, mask=inside)
    tl.store(statistics + splits * rows * heads + index, total, mask=inside)


@triton.jit
def capped(logits, softcap):
    """Return ``softcap * tanh(logits / softcap)``, both in units of log 2."""
    # e^2x is infinite for large x, and tanh is 1 then.
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap)))


@triton.jit
def add_slots(logits, value, largest, total, accumulator, WIDE: tl.constexpr):
    """Update the running softmax with the logits [rows, slots] and the values [slots, D] of further slots."""
    highest = tl.maximum(largest, tl.max(logits, axis=1))
    # For a row without a visible slot so far, infinity must not be subtracted from infinity.
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(logits - anchor[:, None])
    correction = tl.exp2(largest - anchor)
    total = total * correction + tl.sum(weights, axis=1)
    accumulator = multiply(weights.to(value.dtype), value, accumulator * correction[:, None], WIDE)
    return highest, total, accumulator


@triton.jit(do_not_specialize=["stripes"])
def merge_kernel(
    partial,
    statistics,
    out,
    stripes,
    width,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial results, each weighted by its part of the softmax. Grid: (rows, blocks of the width).

    PADDED: number of splits, rounded up to a power of two; all of them are loaded at once
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, PADDED)[:, None]
    inside = (column < width)[None, :] & (split < SPLITS)
    index = split * stripes + (row * (width // HEAD_DIM) + column // HEAD_DIM)[None, :]
    logit = tl.load(statistics + index, mask=inside, other=float("-inf"))
    total = tl.load(statistics + SPLITS * stripes + index, mask=inside, other=0.0)
    place = index.to(tl.int64) * HEAD_DIM + (column % HEAD_DIM)[None, :]
    share = tl.load(partial + place, mask=inside, other=0.0)
    highest = tl.max(logit, axis=0)
    weight = tl.exp2(logit - tl.where(column < width, highest, 0.0)[None, :])
    # Columns beyond the width are not stored, but they must not divide by 0.
    result = tl.sum(weight * share, axis=0) / tl.where(column < width, tl.sum(weight * total, axis=0), 1.0)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=column < width)
