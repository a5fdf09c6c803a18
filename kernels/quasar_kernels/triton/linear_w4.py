"""Matmuls of 4-bit weights with 16-bit or int8 activations. The weights are unpacked in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.blocks import output_block, store_block
from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.dot import multiply
from quasar_kernels.triton.int4_packing import PackedInt4
from quasar_kernels.triton.launch import launch
from quasar_kernels.triton.split_k import arrive, collect
from quasar_kernels.triton.tuning import Tiling

# The kernels shift a half byte to the top of an int8, which multiplies its value by 16.
W4A8_FACTOR = 16.0


def linear_w4a16(x: Tensor, weight: PackedInt4, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """``x W^T + bias``, sums in float32, scaled group by group. x: float [M, K]; returns [M, N] in its dtype."""
    out = torch.empty(len(x), weight.outputs, dtype=x.dtype, device=x.device)
    return _launch(x, None, weight, bias, out, weight.unit, tiling)


def linear_w4a8(
    tokens: Tensor, token_scales: Tensor, weight: PackedInt4, bias: Tensor | None, dtype: torch.dtype, tiling: Tiling
) -> Tensor:
    """``x W^T + bias`` of quantized activations: exact int32 sums in a group, groups added in float32.

    tokens: int8 [M, K]; token_scales: float32 [M, K / group_size]. Returns ``dtype`` [M, N].
    """
    out = torch.empty(len(tokens), weight.outputs, dtype=dtype, device=tokens.device)
    return _launch(tokens, token_scales, weight, bias, out, weight.unit / W4A8_FACTOR, tiling)


def _launch(
    x: Tensor,
    x_scales: Tensor | None,
    weight: PackedInt4,
    bias: Tensor | None,
    out: Tensor,
    unit: float,
    tiling: Tiling,
) -> Tensor:
    constants = {"HAS_ZEROS": weight.zeros is not None, "HAS_BIAS": bias is not None, "INT8": x_scales is not None}
    constants["ASSEMBLY"] = not interpreted() and x.dtype != torch.float32
    operands = (x, x_scales, weight.values, weight.scales, weight.zeros, unit, bias)
    return launch(linear_w4_kernel, operands, out, tiling, **constants, **tiling.by_groups(weight.group_size))


@triton.jit(do_not_specialize=["rows"])
def linear_w4_kernel(
    x,
    x_scales,
    values,
    scales,
    zeros,
    unit,
    bias,
    out,
    partials,
    counters,
    rows,
    outputs,
    inputs,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: as in `Tiling.grid`. An iteration takes GROUPS groups, which must divide K / GROUP."""
    HALF: tl.constexpr = GROUP // 2
    groups = inputs // GROUP
    split = tl.program_id(1)
    row, column, source = output_block(outputs, BLOCK_M, BLOCK_N)
    depth = tl.arange(0, HALF)
    inside = row[:, None] < rows
    x_tile = x + row[:, None] * inputs + depth[None, :]
    tile_row = (source // 16).to(tl.int64) * (groups * 16) + source % 16
    value_tile = values + tile_row[:, None] * HALF + depth[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    share = tl.cdiv(groups, SPLIT_K * GROUPS) * GROUPS
    begin, end = split * share, tl.minimum(split * share + share, groups)
    # Scales are too few to be copied to shared memory ahead of time, as weights are: the next one waits in registers.
    scale = tl.load(scales + tl.minimum(begin, groups - 1) * outputs + source)
    if INT8:
        row_scales = x_scales + row * groups
        row_scale = tl.load(row_scales + tl.minimum(begin, groups - 1), mask=row < rows, other=0.0)
    for first in range(begin, end, GROUPS):
        for step in tl.static_range(GROUPS):
            group = first + step
            w = tl.load(value_tile + group * (16 * HALF), eviction_policy="evict_first")
            x_low = tl.load(x_tile + group * GROUP, mask=inside, other=0, eviction_policy="evict_last")
            x_high = tl.load(x_tile + (group * GROUP + HALF), mask=inside, other=0, eviction_policy="evict_last")
            next_scale = tl.load(scales + tl.minimum(group + 1, groups - 1) * outputs + source)
            if INT8:
                w_low, w_high = unpack_to_int8(w, ASSEMBLY)
                dot = tl.dot(x_low, tl.trans(w_low), out_dtype=tl.int32)
                dot = tl.dot(x_high, tl.trans(w_high), dot, out_dtype=tl.int32).to(tl.float32)
            else:
                w_low, w_high = unpack_to_float(w, x.dtype.element_ty, ASSEMBLY)
                dot = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                dot = multiply(x_low, tl.trans(w_low), dot, not ASSEMBLY)
                dot = multiply(x_high, tl.trans(w_high), dot, not ASSEMBLY)
            if HAS_ZEROS:
                zero = tl.load(zeros + group * outputs + source).to(tl.float32)
                dot -= sum_of_group(x_low, x_high, INT8)[:, None] * zero[None, :]
            if INT8:
                next_row_scale = tl.load(row_scales + tl.minimum(group + 1, groups - 1), mask=row < rows, other=0.0)
                accumulator += dot * (row_scale[:, None] * scale.to(tl.float32)[None, :])
                row_scale = next_row_scale
            else:
                accumulator += dot * scale.to(tl.float32)[None, :]
            scale = next_scale

    if arrive(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K):
        accumulator = collect(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K)
        result = accumulator * unit
        store_block(out, result, bias, row, column, source, rows, outputs, HAS_BIAS)


@triton.jit
def sum_of_group(x_low, x_high, INT8: tl.constexpr):
    """Return the sum of a group's activations, float32 [BLOCK_M], in the units of the dot product."""
    if INT8:
        return (tl.sum(x_low.to(tl.int32), axis=1) + tl.sum(x_high.to(tl.int32), axis=1)).to(tl.float32) * 16.0
    return tl.sum(x_low.to(tl.float32), axis=1) + tl.sum(x_high.to(tl.float32), axis=1)


def _unpacking(one: int, base: int, instruction: str) -> str:
    """Return the assembly that unpacks four bytes to eight 16-bit floats ``q - 8``, two to a register.

    A float whose last mantissa bit is worth 1 takes q as its lowest bits: ``base | q`` is 128 + q in bfloat16 and
    1024 + q in float16. A half is stored as ``q - 8`` in two's complement, which is q with bit 3 inverted, so bit 3 is
    inverted again where the half is joined with ``base``. Then the value of ``base | 8`` is subtracted.

    one, base: bits of 1 and of 128 or 1024 in the format; instruction: multiplies and adds pairs of the format
    """
    pair = 0x00010001
    negative = 0x8000 | base | 8
    select = f"0x000F000F, {(base | 8) * pair:#010x}, 0x6A"
    return f"""
        {{
        .reg .b32 a, b, c, d, one, offset;
        mov.b32 one, {one * pair:#010x};
        mov.b32 offset, {negative * pair:#010x};
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 a, a, {select};
        lop3.b32 b, b, {select};
        lop3.b32 c, c, {select};
        lop3.b32 d, d, {select};
        {instruction} $0, a, one, offset;
        {instruction} $1, b, one, offset;
        {instruction} $2, c, one, offset;
        {instruction} $3, d, one, offset;
        }}
    """


UNPACK_TO_BFLOAT16 = tl.constexpr(_unpacking(0x3F80, 0x4300, "fma.rn.bf16x2"))
UNPACK_TO_FLOAT16 = tl.constexpr(_unpacking(0x3C00, 0x6400, "fma.rn.f16x2"))


@triton.jit
def unpack_to_float(packed, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return ``q - 8`` of the low and of the high halves of bytes, in ``dtype``.

    It is written in assembly because the compiler would convert every byte separately.
    """
    if ASSEMBLY and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            UNPACK_TO_BFLOAT16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            UNPACK_TO_FLOAT16, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = (((packed & 0xF) ^ 8).to(tl.float32) - 8.0).to(dtype)
        high = (((packed >> 4) ^ 8).to(tl.float32) - 8.0).to(dtype)
    return low, high


@triton.jit
def unpack_to_int8(packed, ASSEMBLY: tl.constexpr):
    """Return ``16 (q - 8)`` of the low and of the high halves of bytes, int8."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a;
            shl.b32 a, $2, 4;
            and.b32 $0, a, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }
            """,
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high
