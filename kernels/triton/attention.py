"""Attention of a verification block: the context is split between programs, whose results are merged.

Flash-decoding (Dao et al. 2023) for a block of rows: a program takes one KV head and a share of the slots, with
the query heads of the KV head and the rows of the block packed into one tile, so that each key is read once. The
shares are merged by their log-sum-exp.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.device import interpreted, multiprocessors
from kernels.triton.dot import multiply
from kernels.triton.launch import dependent, wait

BLOCK_SLOTS = 64
MAX_PACKED_ROWS = 32
MAX_SPLITS = 32
MERGE_ELEMENTS = 512


def block_attention(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor, block_mask: Tensor, splits: int | None = None
) -> Tensor:
    """As `reference.block_attention`; ``start`` and the mask are read on the device. Returns [R, H * D].

    splits: programs that share the context, by default from the device and the number of heads alone, so that a
    captured CUDA graph fits every context length.
    """
    rows, heads, head_dim = q.shape
    kv_heads = len(keys)
    group = heads // kv_heads
    if splits is None:
        splits = min(MAX_SPLITS, max(1, multiprocessors(q.device) // kv_heads))
    packed = min(MAX_PACKED_ROWS, max(16, triton.next_power_of_2(group * rows)))
    block_dim = max(16, triton.next_power_of_2(head_dim))
    partial = torch.empty(splits, rows * heads, head_dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(2, splits, rows * heads, dtype=torch.float32, device=q.device)
    block_attention_kernel[(kv_heads, splits, triton.cdiv(group * rows, packed))](
        q,
        keys,
        values,
        start,
        block_mask,
        partial,
        statistics,
        head_dim**-0.5 * math.log2(math.e),
        rows,
        heads,
        splits,
        keys.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        WIDE=interpreted(),
        BLOCK_ROWS=packed,
        BLOCK_SLOTS=BLOCK_SLOTS,
        BLOCK_DIM=block_dim,
        num_warps=4,
        num_stages=2,
        **dependent(q.device),
    )
    out = torch.empty(rows, heads * head_dim, dtype=q.dtype, device=q.device)
    merge_kernel[(rows, triton.cdiv(heads * head_dim, MERGE_ELEMENTS))](
        partial,
        statistics,
        out,
        rows * heads,
        heads * head_dim,
        SPLITS=splits,
        HEAD_DIM=head_dim,
        BLOCK=MERGE_ELEMENTS,
        num_warps=4,
        **dependent(q.device),
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def block_attention_kernel(
    q,
    keys,
    values,
    start,
    block_mask,
    partial,
    statistics,
    scale,
    rows,
    heads,
    splits,
    head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid: (KV heads, splits, blocks of packed rows). Packed row p is head p % GROUP of row p // GROUP.

    partial: unnormalized float32 [splits, R * H, D]; statistics: float32 [2, splits, R * H], the largest logit in
    units of log 2 and the sum of exponentials relative to it.
    """
    wait(DEPENDENT)
    kv_head, split = tl.program_id(0), tl.program_id(1)
    packed = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    inside = row < rows
    depth = tl.arange(0, BLOCK_DIM)
    context = tl.load(start).to(tl.int32)
    end = context + rows
    share = tl.cdiv(tl.cdiv(end, splits), BLOCK_SLOTS) * BLOCK_SLOTS
    query_place = (row * heads + head)[:, None] * HEAD_DIM + depth[None, :]
    query = tl.load(q + query_place, mask=inside[:, None] & (depth[None, :] < HEAD_DIM), other=0.0)
    base = kv_head.to(tl.int64) * head_stride
    largest = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, end), BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        place = base + slot[:, None] * HEAD_DIM + depth[None, :]
        present = (slot[:, None] < end) & (depth[None, :] < HEAD_DIM)
        key = tl.load(keys + place, mask=present, other=0.0)
        value = tl.load(values + place, mask=present, other=0.0)
        logits = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], dtype=tl.float32)
        logits = multiply(query, tl.trans(key), logits, WIDE) * scale
        own = slot[None, :] - context
        in_block = inside[:, None] & (own >= 0) & (own < rows)
        seen = tl.load(block_mask + row[:, None] * rows + own, mask=in_block, other=0) != 0
        logits = tl.where((own < 0) | seen, logits, float("-inf"))
        highest = tl.maximum(largest, tl.max(logits, axis=1))
        # A row that has seen nothing yet must not subtract infinity from itself.
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - anchor[:, None])
        correction = tl.exp2(largest - anchor)
        total = total * correction + tl.sum(weights, axis=1)
        accumulator = accumulator * correction[:, None]
        accumulator = multiply(weights.to(value.dtype), value, accumulator, WIDE)
        largest = highest
    index = split * (rows * heads) + row * heads + head
    out_place = index.to(tl.int64)[:, None] * HEAD_DIM + depth[None, :]
    tl.store(partial + out_place, accumulator, mask=inside[:, None] & (depth[None, :] < HEAD_DIM))
    tl.store(statistics + index, largest, mask=inside)
    tl.store(statistics + splits * rows * heads + index, total, mask=inside)


@triton.jit(do_not_specialize=["stripes"])
def merge_kernel(
    partial,
    statistics,
    out,
    stripes,
    width,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid: (rows, blocks of the width). Adds the splits' shares, each weighted by its part of the softmax."""
    wait(DEPENDENT)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    stripe = row * (width // HEAD_DIM) + column // HEAD_DIM
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(statistics + split * stripes + stripe, mask=inside, other=0.0))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    result = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        index = split * stripes + stripe
        weight = tl.exp2(tl.load(statistics + index, mask=inside, other=0.0) - highest)
        total += weight * tl.load(statistics + SPLITS * stripes + index, mask=inside, other=1.0)
        share = tl.load(partial + index.to(tl.int64) * HEAD_DIM + column % HEAD_DIM, mask=inside, other=0.0)
        result += weight * share
    tl.store(out + row * width + column, (result / total).to(out.dtype.element_ty), mask=inside)
