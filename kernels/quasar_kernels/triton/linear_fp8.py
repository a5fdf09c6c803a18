"""Matmuls of FP8 weights with FP8 activations on the tensor cores; the epilogue applies scales and bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.blocks import load_blocks, output_block, store_block
from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.launch import launch
from quasar_kernels.triton.split_k import arrive, collect
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
    out = torch.empty(rows, len(values), dtype=dtype, device=tokens.device)
    operands = (tokens, token_scales, values, scales, bias)
    constants = {"HAS_BIAS": bias is not None, "WIDE": interpreted()}
    return launch(linear_fp8_kernel, operands, out, tiling, **constants, **tiling.by_inputs(inputs))


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
    """Grid: as in `Tiling.grid`. WIDE: multiply in float32; the interpreter has no FP8."""
    row, column, source = output_block(outputs, BLOCK_M, BLOCK_N)
    source = source.to(tl.int64)
    inside, depth = row[:, None] < rows, tl.arange(0, BLOCK_K)[None, :]
    token_rows, value_rows = tokens + row[:, None] * inputs, values + source[:, None] * inputs
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, inputs, BLOCK_K * SPLIT_K):
        x, w = load_blocks(token_rows, value_rows, inside, start, depth, inputs, EVEN_K)
        if WIDE:
            accumulator = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), accumulator, input_precision="ieee")
        else:
            # Hopper's tensor cores add FP8 products in fewer bits than float32 unless they are told not to.
            accumulator = tl.dot(x, tl.trans(w), accumulator, max_num_imprecise_acc=0)

    if arrive(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K):
        accumulator = collect(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K)
        row_scale = tl.load(token_scales + row, mask=row < rows, other=0.0)
        result = accumulator * (row_scale[:, None] * tl.load(scales + source)[None, :])
        store_block(out, result, bias, row, column, source, rows, outputs, HAS_BIAS)
