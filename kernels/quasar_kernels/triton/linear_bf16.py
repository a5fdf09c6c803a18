"""Matmuls of 16-bit activations with unquantized or int8 weights, because cuBLAS wastes bandwidth for few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.dot import multiply
from quasar_kernels.triton.split_k import Workspace, arrive, collect
from quasar_kernels.triton.tuning import Tiling


def linear_bf16(x: Tensor, values: Tensor, bias: Tensor | None, tiling: Tiling, scales: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, sums in float32. x: float [M, K]; values: [N, K] in the same dtype, or int8, which that dtype
    holds exactly, with float32 ``scales`` [N]; returns [M, N] in the dtype of x."""
    rows, inputs = x.shape
    outputs = len(values)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    partials, counters = Workspace.of(x.device).reserve(*tiling.workspace(rows, outputs), torch.float32)
    linear_bf16_kernel[tiling.grid(rows, outputs)](
        x,
        values,
        x if scales is None else scales,
        x if bias is None else bias,
        out,
        partials,
        counters,
        rows,
        outputs,
        inputs,
        SCALED=scales is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=inputs % tiling.block_k == 0,
        WIDE=interpreted(),
        BLOCK_K=tiling.block_k,
        **tiling.sizes,
        **tiling.options,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def linear_bf16_kernel(
    x,
    values,
    scales,
    bias,
    out,
    partials,
    counters,
    rows,
    outputs,
    inputs,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: (blocks of N, SPLIT_K, blocks of M)."""
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.where(column < outputs, column, 0).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    inside = row[:, None] < rows
    x_tile = x + row[:, None] * inputs + depth[None, :]
    value_tile = values + source[:, None] * inputs + depth[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(split * BLOCK_K, inputs, BLOCK_K * SPLIT_K):
        if EVEN_K:
            a = tl.load(x_tile + start, mask=inside, other=0, eviction_policy="evict_last")
            w = tl.load(value_tile + start, eviction_policy="evict_first")
        else:
            within = start + depth[None, :] < inputs
            a = tl.load(x_tile + start, mask=inside & within, other=0, eviction_policy="evict_last")
            w = tl.load(value_tile + start, mask=within, other=0, eviction_policy="evict_first")
        if SCALED and not WIDE:
            w = w.to(x.dtype.element_ty)
        accumulator = multiply(a, tl.trans(w), accumulator, WIDE)

    finished = True
    if SPLIT_K > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        finished = arrive(partials, counters, accumulator, tile, split, BLOCK_M, BLOCK_N, SPLIT_K)
    if finished:
        if SPLIT_K > 1:
            accumulator = collect(partials, counters, tile, BLOCK_M, BLOCK_N, SPLIT_K)
        if SCALED:
            accumulator *= tl.load(scales + source)[None, :]
        if HAS_BIAS:
            accumulator += tl.load(bias + source)[None, :].to(tl.float32)
        place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
        tl.store(place, accumulator.to(out.dtype.element_ty), mask=inside & (column[None, :] < outputs))
