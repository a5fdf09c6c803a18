"""The end of a matmul whose K dimension is split between programs. The last program adds the partial sums.

Partial sums are added in ascending order of the split, whichever program comes last, so that a result does not
depend on timing. The programs of a tile meet at a counter, which the last one sets back to 0 for the next launch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def arrive(partials, counters, sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """Store this program's sums [BLOCK_M, BLOCK_N]. Returns True in the last program of the tile, which finishes it."""
    if SPLIT_K == 1:
        return True
    tile, element = tile_index(), elements_of_tile(BLOCK_M, BLOCK_N)
    base = (tile * SPLIT_K + tl.program_id(1)) * (BLOCK_M * BLOCK_N)
    tl.store(partials + base + element, sums)
    # The partial sums of every thread must be visible before one thread announces them.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
    return arrived == SPLIT_K - 1


@triton.jit
def collect(partials, counters, sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """Return the sum over all splits of the tile, [BLOCK_M, BLOCK_N]. sums: those of this program"""
    if SPLIT_K == 1:
        return sums
    tile, element = tile_index(), elements_of_tile(BLOCK_M, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=partials.dtype.element_ty)
    for split in tl.static_range(SPLIT_K):
        base = (tile * SPLIT_K + split) * (BLOCK_M * BLOCK_N)
        # The L1 cache may contain values that another program has overwritten.
        total += tl.load(partials + base + element, cache_modifier=".cg")
    tl.store(counters + tile, 0)
    return total


@triton.jit
def tile_index():
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def elements_of_tile(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


class Workspace:
    """Partial sums and counters of one device, which all matmuls of a stream share.

    They are never freed, because captured CUDA graphs contain their addresses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[Tensor] = []
        self._partials = torch.empty(0, dtype=torch.int32, device=device)
        self._counters = torch.empty(0, dtype=torch.int32, device=device)

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Workspace:
        """Return the workspace of a device."""
        return Workspace(device)

    def reserve(self, tiles: int, elements: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``elements`` uninitialized 32-bit partial sums of ``dtype``, and ``tiles`` counters that are 0."""
        if elements > len(self._partials):
            self._kept.append(self._partials)
            self._partials = torch.empty(max(elements, 1 << 20), dtype=torch.int32, device=self._device)
        if tiles > len(self._counters):
            self._kept.append(self._counters)
            self._counters = torch.zeros(max(tiles, 1 << 14), dtype=torch.int32, device=self._device)
        return self._partials.view(dtype), self._counters
