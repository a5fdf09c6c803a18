"""Matmuls of FP8 weights with FP8 activations on the tensor cores; the epilogue applies scales and bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.split_k import Workspace, arrive, collect
from quasar_kernels.triton.tuning import Tiling


def linear_fp8(
    tokens: Tensor,
    token_scales: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """``x W^T + bias`` of quantized activations, added in float32.

    tokens: float8_e4m3fn [M, K]; token_scales: float32 [M, 1]; values: float8_e4m3fn [N, K]; scales: float32 [N]; bias:
    float [N]. Returns ``dtype`` [M, N].
    """
    rows, inputs = tokens.shape
    outputs = len(values)
    out = torch.empty(rows, outputs, dtype=dtype, device=tokens.device)
    partials, counters = Workspace.of(tokens.device).reserve(*tiling.workspace(rows, outputs), torch.float32)
    linear_fp8_kernel[tiling.grid(rows, outputs)](
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
        WIDE=interpreted(),
        BLOCK_K=tiling.block_k,
        **tiling.sizes,
        **tiling.options,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def linear_fp8_kernel(
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
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: (blocks of N, SPLIT_K, blocks of M). WIDE: multiply in float32; the interpreter has no FP8."""
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns beyond N read column 0, which saves the mask on the weights, and are not stored.
    source = tl.where(column < outputs, column, 0).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    inside = row[:, None] < rows
    token_tile = tokens + row[:, None] * inputs + depth[None, :]
    value_tile = values + source[:, None] * inputs + depth[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(split * BLOCK_K, inputs, BLOCK_K * SPLIT_K):
        if EVEN_K:
            x = tl.load(token_tile + start, mask=inside, other=0.0, eviction_policy="evict_last")
            w = tl.load(value_tile + start, eviction_policy="evict_first")
        else:
            within = start + depth[None, :] < inputs
            x = tl.load(token_tile + start, mask=inside & within, other=0.0, eviction_policy="evict_last")
            w = tl.load(value_tile + start, mask=within, other=0.0, eviction_policy="evict_first")
        if WIDE:
            accumulator = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), accumulator, input_precision="ieee")
        else:
            # Hopper's tensor cores add FP8 products in fewer bits than float32 unless they are told not to.
            accumulator = tl.dot(x, tl.trans(w), accumulator, max_num_imprecise_acc=0)

    finished = True
    if SPLIT_K > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        finished = arrive(partials, counters, accumulator, tile, split, BLOCK_M, BLOCK_N, SPLIT_K)
    if finished:
        if SPLIT_K > 1:
            accumulator = collect(partials, counters, tile, BLOCK_M, BLOCK_N, SPLIT_K)
        row_scale = tl.load(token_scales + row, mask=row < rows, other=0.0)
        result = accumulator * (row_scale[:, None] * tl.load(scales + source)[None, :])
        if HAS_BIAS:
            result += tl.load(bias + source)[None, :].to(tl.float32)
        place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside & (column[None, :] < outputs))
