"""Matmuls of int8 weights with int8 activations on the integer tensor cores; the epilogue applies scales and bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.split_k import Workspace, arrive, collect
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
    """``x W^T + bias`` of quantized activations; int32 sums are exact.

    tokens: int8 [M, K]; token_scales: float32 [M, 1]; values: int8 [N, K]; scales: float32 [N]; bias: float [N].
    Returns ``dtype`` [M, N].
    """
    rows, inputs = tokens.shape
    outputs = len(values)
    out = torch.empty(rows, outputs, dtype=dtype, device=tokens.device)
    grid = tiling.grid(rows, outputs)
    partials, counters = Workspace.of(tokens.device).reserve(*tiling.workspace(rows, outputs), torch.int32)
    linear_w8a8_kernel[grid](
        tokens,
        token_scales,
        values,
        scales,
        scales if bias is None else bias,
        out,
        partials,
        counters,
        rows,
        outputs,
        inputs,
        HAS_BIAS=bias is not None,
        EVEN_K=inputs % tiling.block_k == 0,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        SPLIT_K=tiling.split_k,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: (blocks of N, SPLIT_K, blocks of M). Rows beyond M exist in registers only."""
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns beyond N read column 0, which saves the mask on the weights, and are not stored.
    source = tl.where(column < outputs, column, 0).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    token_tile = tokens + row[:, None] * inputs + depth[None, :]
    value_tile = values + source[:, None] * inputs + depth[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(split * BLOCK_K, inputs, BLOCK_K * SPLIT_K):
        if EVEN_K:
            x = tl.load(token_tile + start, mask=row[:, None] < rows, other=0, eviction_policy="evict_last")
            w = tl.load(value_tile + start, eviction_policy="evict_first")
        else:
            inside = start + depth[None, :] < inputs
            x = tl.load(token_tile + start, mask=(row[:, None] < rows) & inside, other=0, eviction_policy="evict_last")
            w = tl.load(value_tile + start, mask=inside, other=0, eviction_policy="evict_first")
        accumulator = tl.dot(x, tl.trans(w), accumulator, out_dtype=tl.int32)

    finished = True
    if SPLIT_K > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        finished = arrive(partials, counters, accumulator, tile, split, BLOCK_M, BLOCK_N, SPLIT_K)
    if finished:
        if SPLIT_K > 1:
            accumulator = collect(partials, counters, tile, BLOCK_M, BLOCK_N, SPLIT_K)
        row_scale = tl.load(token_scales + row, mask=row < rows, other=0.0)
        column_scale = tl.load(scales + source)
        result = accumulator.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
        if HAS_BIAS:
            result += tl.load(bias + source)[None, :].to(tl.float32)
        place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < outputs))
