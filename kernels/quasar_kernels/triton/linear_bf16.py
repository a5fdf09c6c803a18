"""Matmuls of 16-bit activations with unquantized or int8 weights, because cuBLAS wastes bandwidth for few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.triton.blocks import load_blocks, output_block, store_block
from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.dot import multiply
from quasar_kernels.triton.launch import launch
from quasar_kernels.triton.split_k import arrive, collect
from quasar_kernels.triton.tuning import Tiling


def linear_bf16(x: Tensor, values: Tensor, bias: Tensor | None, tiling: Tiling, scales: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, sums in float32. x: float [M, K]; values: [N, K] in the same dtype, or int8, which that dtype
    holds exactly, with float32 ``scales`` [N]; returns [M, N] in the dtype of x."""
    rows, inputs = x.shape
    out = torch.empty(rows, len(values), dtype=x.dtype, device=x.device)
    constants = {"SCALED": scales is not None, "HAS_BIAS": bias is not None, "WIDE": interpreted()}
    operands = (x, values, scales, bias)
    return launch(linear_bf16_kernel, operands, out, tiling, **constants, **tiling.by_inputs(inputs))


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
    """Grid: as in `Tiling.grid`. SCALED: whether the weights are int8; WIDE: as in `multiply`."""
    row, column, source = output_block(outputs, BLOCK_M, BLOCK_N)
    source = source.to(tl.int64)
    inside, depth = row[:, None] < rows, tl.arange(0, BLOCK_K)[None, :]
    x_rows, value_rows = x + row[:, None] * inputs, values + source[:, None] * inputs
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, inputs, BLOCK_K * SPLIT_K):
        a, w = load_blocks(x_rows, value_rows, inside, start, depth, inputs, EVEN_K)
        if SCALED and not WIDE:
            w = w.to(x.dtype.element_ty)
        accumulator = multiply(a, tl.trans(w), accumulator, WIDE)

    if arrive(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K):
        accumulator = collect(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K)
        if SCALED:
            accumulator *= tl.load(scales + source)[None, :]
        store_block(out, accumulator, bias, row, column, source, rows, outputs, HAS_BIAS)
