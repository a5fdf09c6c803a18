"""Matmuls of 16-bit activations with int8 weights that have scales, and perhaps minimums, in groups of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_kernels.group_numbers import GroupNumbers
from quasar_kernels.triton.device import interpreted
from quasar_kernels.triton.dot import multiply
from quasar_kernels.triton.split_k import Workspace, arrive, collect
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
    rows, inputs = x.shape
    outputs = len(weight.values)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    partials, counters = Workspace.of(x.device).reserve(*tiling.workspace(rows, outputs), torch.float32)
    minimums = weight.scales if weight.minimums is None else weight.minimums
    linear_w8_groups_kernel[tiling.grid(rows, outputs)](
        x,
        weight.values,
        *weight.scales.pointers,
        *minimums.pointers,
        x if bias is None else bias,
        out,
        partials,
        counters,
        rows,
        outputs,
        inputs,
        GROUP=weight.group_size,
        SCALE_SHARED=weight.scales.shared,
        MINIMUM_SHARED=minimums.shared,
        HAS_MINIMUMS=weight.minimums is not None,
        HAS_BIAS=bias is not None,
        WIDE=interpreted(),
        GROUPS=tiling.block_k // weight.group_size,
        **tiling.sizes,
        **tiling.options,
    )
    return out


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
    """Grid: (blocks of N, SPLIT_K, blocks of M). An iteration takes GROUPS groups, which must divide K / GROUP."""
    groups = inputs // GROUP
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns beyond N read column 0, which saves the mask on the weights, and are not stored.
    source = tl.where(column < outputs, column, 0)
    depth = tl.arange(0, GROUP)
    inside = row[:, None] < rows
    x_tile = x + row[:, None] * inputs + depth[None, :]
    value_tile = values + source.to(tl.int64)[:, None] * inputs + depth[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    share = tl.cdiv(groups, SPLIT_K * GROUPS) * GROUPS
    for first in range(split * share, tl.minimum(split * share + share, groups), GROUPS):
        for step in tl.static_range(GROUPS):
            group = first + step
            a = tl.load(x_tile + group * GROUP, mask=inside, other=0, eviction_policy="evict_last")
            w = tl.load(value_tile + group * GROUP, eviction_policy="evict_first")
            if not WIDE:
                w = w.to(x.dtype.element_ty)
            dot = multiply(a, tl.trans(w), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), WIDE)
            scale = group_numbers(scales, scale_factors, group, outputs, source, SCALE_SHARED)
            accumulator += dot * scale[None, :]
            if HAS_MINIMUMS:
                minimum = group_numbers(minimums, minimum_factors, group, outputs, source, MINIMUM_SHARED)
                accumulator -= tl.sum(a.to(tl.float32), axis=1)[:, None] * minimum[None, :]

    finished = True
    if SPLIT_K > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        finished = arrive(partials, counters, accumulator, tile, split, BLOCK_M, BLOCK_N, SPLIT_K)
    if finished:
        if SPLIT_K > 1:
            accumulator = collect(partials, counters, tile, BLOCK_M, BLOCK_N, SPLIT_K)
        if HAS_BIAS:
            accumulator += tl.load(bias + source)[None, :].to(tl.float32)
        place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
        tl.store(place, accumulator.to(out.dtype.element_ty), mask=inside & (column[None, :] < outputs))


@triton.jit
def group_numbers(values, factors, group, outputs, source, SHARED: tl.constexpr):
    """Return the numbers of one group, float32 [BLOCK_N]. SHARED: as in `TransposedNumbers`."""
    if SHARED == 0:
        return tl.load(values + group * outputs + source).to(tl.float32)
    shared = tl.load(values + (group // SHARED) * outputs + source).to(tl.float32)
    return shared * tl.load(factors + group * outputs + source).to(tl.float32)
