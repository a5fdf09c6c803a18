"""Matmuls of 16-bit activations with int8 weights that have scales, and perhaps minimums, in groups of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.group_numbers import GroupNumbers
from quasar_kernels.triton.blocks import load_blocks, output_block, store_block
from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.dot import multiply
from quasar_kernels.triton.launch import launch
from quasar_kernels.triton.split_k import arrive, collect
from quasar_kernels.triton.tuning import Tiling


@dataclass(frozen=True)
class TransposedNumbers:
    """`GroupNumbers` with the outputs last: values [S, N]; factors int8 [G, N], or None."""

    values: Tensor
    factors: Tensor | None

    @staticmethod
    def of(numbers: GroupNumbers) -> TransposedNumbers:
        factors = None if numbers.factors is None else numbers.factors.T.contiguous()
        return TransposedNumbers(numbers.values.T.contiguous(), factors)

    @property
    def shared(self) -> int:
        """The number of groups that share a value; 0 if there are no factors."""
        return 0 if self.factors is None else len(self.factors) // len(self.values)

    @property
    def pointers(self) -> tuple[Tensor, Tensor]:
        return self.values, self.values if self.factors is None else self.factors


@dataclass(frozen=True)
class PackedGroupInt8:
    """An int8 weight ``q * scale - minimum`` for the GPU. values: int8 [N, K]; minimums: None if all are 0."""

    values: Tensor
    scales: TransposedNumbers
    minimums: TransposedNumbers | None
    group_size: int


def linear_w8_groups(x: Tensor, weight: PackedGroupInt8, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """``x W^T + bias``, sums in float32, scaled group by group. x: float [M, K]; returns [M, N] in its dtype."""
    out = torch.empty(len(x), len(weight.values), dtype=x.dtype, device=x.device)
    minimums = weight.scales if weight.minimums is None else weight.minimums
    operands = (x, weight.values, *weight.scales.pointers, *minimums.pointers, bias)
    constants = {"SCALE_SHARED": weight.scales.shared, "MINIMUM_SHARED": minimums.shared}
    constants |= {"HAS_MINIMUMS": weight.minimums is not None, "HAS_BIAS": bias is not None, "WIDE": interpreted()}
    return launch(linear_w8_groups_kernel, operands, out, tiling, **constants, **tiling.by_groups(weight.group_size))


@triton.jit(do_not_specialize=["rows"])
def linear_w8_groups_kernel(
    x,
    values,
    scales,
    scale_factors,
    minimums,
    minimum_factors,
    bias,
    out,
    partials,
    counters,
    rows,
    outputs,
    inputs,
    GROUP: tl.constexpr,
    SCALE_SHARED: tl.constexpr,
    MINIMUM_SHARED: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: as in `Tiling.grid`. An iteration takes GROUPS groups, which must divide K / GROUP."""
    groups = inputs // GROUP
    split = tl.program_id(1)
    row, column, source = output_block(outputs, BLOCK_M, BLOCK_N)
    inside, depth = row[:, None] < rows, tl.arange(0, GROUP)[None, :]
    x_rows, value_rows = x + row[:, None] * inputs, values + source.to(tl.int64)[:, None] * inputs
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    share = tl.cdiv(groups, SPLIT_K * GROUPS) * GROUPS
    for first in range(split * share, tl.minimum(split * share + share, groups), GROUPS):
        for step in tl.static_range(GROUPS):
            group = first + step
            a, w = load_blocks(x_rows, value_rows, inside, group * GROUP, depth, inputs, True)
            if not WIDE:
                w = w.to(x.dtype.element_ty)
            dot = multiply(a, tl.trans(w), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), WIDE)
            scale = group_numbers(scales, scale_factors, group, outputs, source, SCALE_SHARED)
            accumulator += dot * scale[None, :]
            if HAS_MINIMUMS:
                minimum = group_numbers(minimums, minimum_factors, group, outputs, source, MINIMUM_SHARED)
                accumulator -= tl.sum(a.to(tl.float32), axis=1)[:, None] * minimum[None, :]

    if arrive(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K):
        accumulator = collect(partials, counters, accumulator, BLOCK_M, BLOCK_N, SPLIT_K)
        store_block(out, accumulator, bias, row, column, source, rows, outputs, HAS_BIAS)


@triton.jit
def group_numbers(values, factors, group, outputs, source, SHARED: tl.constexpr):
    """Return the numbers of one group, float32 [BLOCK_N]. SHARED: as in `TransposedNumbers`."""
    if SHARED == 0:
        return tl.load(values + group * outputs + source).to(tl.float32)
    shared = tl.load(values + (group // SHARED) * outputs + source).to(tl.float32)
    return shared * tl.load(factors + group * outputs + source).to(tl.float32)
