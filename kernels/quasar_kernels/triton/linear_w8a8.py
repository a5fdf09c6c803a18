"""Matmuls of int8 weights with int8 activations on the integer tensor cores; the epilogue applies scales and bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.blocks import load_blocks, output_block, store_block
from quasar_kernels.triton.launch import launch
from quasar_kernels.triton.split_k import arrive, collect
from quasar_kernels.triton.tuning import Tiling


def linear_w8a8(
    tokens: Tensor,
    token_scales: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """``x W^T + bias`` of quantized activations; int32 sums are exact, groups are added in float32.

    tokens: int8 [M, K]; token_scales: float32 [M, G], for groups of K / G inputs; values: int8 [N, K]; scales: float32
    [N]; bias: float [N]. With several groups, ``block_k`` is a multiple of theirs. Returns ``dtype`` [M, N].
    """
    rows, inputs = tokens.shape
    groups = token_scales.shape[1]
    group = inputs // groups if groups > 1 else 0
    out = torch.empty(rows, len(values), dtype=dtype, device=tokens.device)
    operands = (tokens, token_scales, values, scales, bias)
    constants = {"HAS_BIAS": bias is not None, "GROUP": group, **tiling.by_inputs(inputs)}
    return launch(linear_w8a8_kernel, operands, out, tiling, torch.float32 if group else torch.int32, **constants)


@triton.jit(do_not_specialize=["rows"])
def linear_w8a8_kernel(
    tokens,
    token_scales,
    values,
    scales,
    bias,
    out,
    partials,
    counters,
    rows,
    outputs,
    inputs,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: as in `Tiling.grid`. GROUP: inputs that share a scale of the activations, 0 if all inputs of a row do."""
    split = tl.program_id(1)
    row, column, source = output_block(outputs, BLOCK_M, BLOCK_N)
    source = source.to(tl.int64)
    inside = row[:, None] < rows
    token_rows, value_rows = tokens + row[:, None] * inputs, values + source[:, None] * inputs
    if GROUP == 0:
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        depth = tl.arange(0, BLOCK_K)[None, :]
        for start in range(split * BLOCK_K, inputs, BLOCK_K * SPLIT_K):
            x, w = load_blocks(token_rows, value_rows, inside, start, depth, inputs, EVEN_K)
            accumulator = tl.dot(x, tl.trans(w), accumulator, out_dtype=tl.int32)
    else:
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        depth = tl.arange(0, GROUP)[None, :]
        groups = inputs // GROUP
        share = tl.cdiv(inputs, SPLIT_K * BLOCK_K) * (BLOCK_K // GROUP)
        begin = split * share
        # Scales are too few to be copied to shared memory ahead of time, as weights are.
        row_scales = token_scales + row * groups
        row_scale = tl.load(row_scales + tl.minimum(begin, groups - 1), mask=row < rows, other=0.0)
        for first in range(begin, tl.minimum(begin + share, groups), BLOCK_K // GROUP):
            for step in tl.static_range(BLOCK_K // GROUP):
                start = (first + step) * GROUP
                x, w = load_blocks(token_rows, value_rows, inside, start, depth, inputs, True)
                following = tl.minimum(first + step + 1, groups - 1)
                next_row_scale = tl.load(row_scales + following, mask=row < rows, other=0.0)
                dot = tl.dot(x, tl.trans(w), out_dtype=tl.int32)
                accumulator += dot.to(tl.float32) * row_scale[:, None]
                row_scale = next_row_scale

    if arrive(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K):
        accumulator = collect(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K)
        column_scale = tl.load(scales + source)
        if GROUP == 0:
            row_scale = tl.load(token_scales + row, mask=row < rows, other=0.0)
            result = accumulator.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
        else:
            result = accumulator * column_scale[None, :]
        store_block(out, result, bias, row, column, source, rows, outputs, HAS_BIAS)
