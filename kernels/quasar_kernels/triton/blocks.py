"""What every matmul kernel does around its inner loop: it locates its block of outputs, loads blocks of both operands,
and stores the block with its bias. The grid is (blocks of N, SPLIT_K, blocks of M), as in `Tiling.grid`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_block(outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the rows [BLOCK_M] and columns [BLOCK_N] of this program, and the columns to load weights from.

    Columns beyond N load the weights of column 0, which saves the mask on the weights, and are not stored.
    """
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, column, tl.where(column < outputs, column, 0)


@triton.jit
def load_blocks(activation_rows, weight_rows, inside, start, depth, inputs, EVEN_K: tl.constexpr):
    """Return a block of activations [BLOCK_M, BLOCK_K] and a block of weights [BLOCK_N, BLOCK_K].

    activation_rows, weight_rows: pointers to the first inputs, [BLOCK_M, 1] and [BLOCK_N, 1]
    inside: whether a row is below M, [BLOCK_M, 1]
    start: the first input to load; depth: 0 to BLOCK_K - 1, [1, BLOCK_K]
    EVEN_K: whether all inputs of the block are below K; otherwise 0 is loaded for those that are not
    """
    # In this order only one addition per pointer is left in the loop over K.
    activation_tile, weight_tile = activation_rows + depth + start, weight_rows + depth + start
    # A weight is read once. Activations are read by every block of N, so they have priority in the L2 cache.
    if EVEN_K:
        activations = tl.load(activation_tile, mask=inside, other=0.0, eviction_policy="evict_last")
        weights = tl.load(weight_tile, eviction_policy="evict_first")
    else:
        within = start + depth < inputs
        activations = tl.load(activation_tile, mask=inside & within, other=0.0, eviction_policy="evict_last")
        weights = tl.load(weight_tile, mask=within, other=0.0, eviction_policy="evict_first")
    return activations, weights


@triton.jit
def store_block(out, block, bias, row, column, source, rows, outputs, HAS_BIAS: tl.constexpr):
    """Add the bias in float32 to a block, float32 [BLOCK_M, BLOCK_N], and store what is inside of ``out`` [M, N]."""
    if HAS_BIAS:
        block += tl.load(bias + source)[None, :].to(tl.float32)
    place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(place, block.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < outputs))
