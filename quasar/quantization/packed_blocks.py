"""Quantized rows in the blocks of ggml, and how rows of different types become one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from quasar_kernels import GroupInt8Weight, GroupNumbers, Int4Weight
from quasar_kernels.gpu import has_gpu_kernels
from quasar_kernels.ops.linear_w4a16 import TRITON_GROUP_SIZES
from quasar_kernels.reference import pack_int4
from torch import Tensor

from quasar.quantization.layers import GroupInt8Linear, W4Linear

MIDDLE = 8
"""The zero point of 4-bit values without minimums."""


@dataclass(frozen=True)
class BlockRows:
    """Quantized rows of one linear layer in groups of consecutive columns: ``q * scale - minimum``.

    values:   int8 [N, K], or uint8 [N, K] in 0..15 for 4 bits
    minimums: None if all are 0; then 4-bit values stand for ``q - 8``
    """

    bits: Literal[4, 8]
    values: Tensor
    scales: GroupNumbers
    minimums: GroupNumbers | None = None

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.groups

    def weight(self, device: torch.device, dtype: torch.dtype) -> Int4Weight | GroupInt8Weight:
        """Return the operand of the matmuls. No value, scale or minimum is rounded."""
        here = self.mapped(lambda part: part.to(device))
        if here.bits == 4 and device.type == "cuda" and self.group_size not in TRITON_GROUP_SIZES:
            here = _as_int8(here, self.group_size, here.minimums is not None)
        if here.bits == 8:
            return GroupInt8Weight(here.values, here.scales, here.minimums)
        zeros: Tensor | GroupNumbers | None = here.minimums
        if zeros is None:
            zeros = torch.full((len(here.values), here.scales.groups), float(MIDDLE), device=device)
        weight = Int4Weight(pack_int4(here.values), here.scales, zeros, here.minimums is None, dtype)
        if has_gpu_kernels(here.values):
            weight.packed_for_triton()  # now, because its bytes are counted before the first pass
        return weight

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BlockRows:
        """Return the rows with ``change`` applied to every tensor, all of which have one row per output."""

        def numbers(part: GroupNumbers) -> GroupNumbers:
            return GroupNumbers(change(part.values), None if part.factors is None else change(part.factors))

        minimums = None if self.minimums is None else numbers(self.minimums)
        return BlockRows(self.bits, change(self.values), numbers(self.scales), minimums)


def layer_of_blocks(
    parts: Sequence[BlockRows], dtype: torch.dtype, device: torch.device, activation_bits: int
) -> W4Linear | GroupInt8Linear:
    """Build one layer without bias from the stacked rows of its parts."""
    weight = stacked(parts).weight(device, dtype)
    if isinstance(weight, GroupInt8Weight):
        return GroupInt8Linear(weight, None)
    return W4Linear(weight, None, activation_bits)


def stacked(parts: Sequence[BlockRows]) -> BlockRows:
    """Stack rows. Rows of different types are stored as int8 in groups that all of them have, which is exact.

    For example 4 bits in groups of 32 (Q4_K) and 8 bits in groups of 16 (Q6_K) become 8 bits in groups of 16.
    """
    forms = {(part.bits, part.group_size, part.minimums is None) for part in parts}
    if len(forms) > 1:
        size = math.gcd(*(part.group_size for part in parts))
        minimums = any(part.minimums is not None for part in parts)
        parts = [_as_int8(part, size, minimums) for part in parts]
    minimums_of = [part.minimums for part in parts if part.minimums is not None]
    return BlockRows(
        parts[0].bits,
        torch.cat([part.values for part in parts]),
        _stacked_numbers([part.scales for part in parts]),
        _stacked_numbers(minimums_of) if minimums_of else None,
    )


def _as_int8(rows: BlockRows, group_size: int, minimums: bool) -> BlockRows:
    centered = rows.bits == 4 and rows.minimums is None
    values = rows.values.to(torch.int8) - (MIDDLE if centered else 0)
    repeats = rows.group_size // group_size
    scales, lowest = _repeated(rows.scales, repeats), rows.minimums
    if lowest is not None:
        lowest = _repeated(lowest, repeats)
    elif minimums:
        lowest = GroupNumbers(torch.zeros_like(scales.values), None if scales.factors is None else scales.factors)
    return BlockRows(8, values, scales, lowest)


def _repeated(numbers: GroupNumbers, repeats: int) -> GroupNumbers:
    """Divide every group into equal ones."""
    if numbers.factors is None:
        return GroupNumbers(numbers.values.repeat_interleave(repeats, dim=1))
    return GroupNumbers(numbers.values, numbers.factors.repeat_interleave(repeats, dim=1))


def _stacked_numbers(parts: Sequence[GroupNumbers]) -> GroupNumbers:
    """Stack numbers of the same number of groups; where they have different structures, without factors."""
    if len({(part.values.dtype, part.values.shape[1], part.factors is None) for part in parts}) > 1:
        return GroupNumbers.compact(torch.cat([part.expanded() for part in parts]))
    factors = [part.factors for part in parts if part.factors is not None]
    return GroupNumbers(torch.cat([part.values for part in parts]), torch.cat(factors) if factors else None)
