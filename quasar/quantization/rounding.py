"""Quantization grids of weight matrices, and rounding to the nearest grid point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quasar_kernels import Int8Weight
from torch import Tensor

INT4_LEVELS = 15
INT8_MAX = 127
# Shares of a group's range that the clipping search tries. A smaller range has finer steps but clips the ends.
CLIPPING = tuple(1.0 - 0.05 * step for step in range(11))


@dataclass(frozen=True)
class Grid4:
    """A 4-bit grid per group: ``(q - zero) * scale`` for q in 0..15. Both tensors are float32 [N, K / group_size]."""

    scales: Tensor
    zeros: Tensor


def int8_scales(weight: Tensor) -> Tensor:
    """Return the scale of every output channel of a weight [N, K] on the int8 grid, float32 [N]."""
    return _positive(weight.float().abs().amax(dim=1) / INT8_MAX)


def quantize_int8(weight: Tensor, activation_group: int = 0) -> Int8Weight:
    """Quantize a weight, float [N, K], to int8 with one scale per output channel: ``w ≈ values * scale``.

    The values are in -127..127. activation_group: see `Int8Weight`
    """
    scales = int8_scales(weight)
    values = torch.round(weight.float() / scales.unsqueeze(1)).to(torch.int8)
    return Int8Weight(values, scales, activation_group)


def grid_int4(
    weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None = None, clip: bool = True
) -> Grid4:
    """Return the grid of every group of ``group_size`` weights along K.

    Symmetric grids have zero 8 and span [-7, 7] steps. Asymmetric grids span the range of the group, extended to
    include 0.

    weight: float [N, K], where K is a multiple of ``group_size``
    importance: float [K], weights of the squared errors per input channel, or None for equal weights
    clip: whether to choose the share of each group's range (`CLIPPING`) that has the least squared error
    """
    groups = weight.float().view(weight.shape[0], -1, group_size)
    if symmetric:
        high = groups.abs().amax(dim=2)
        low = -high
    else:
        low, high = groups.amin(dim=2).clamp(max=0.0), groups.amax(dim=2).clamp(min=0.0)
    best = _grid(low, high, symmetric)
    if not clip:
        return best
    weights = 1.0 if importance is None else importance.float().view(1, -1, group_size)
    least = _squared_error(groups, best, weights)
    for share in CLIPPING[1:]:
        grid = _grid(low * share, high * share, symmetric)
        error = _squared_error(groups, grid, weights)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid4(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
    return best


def round_int4(weight: Tensor, grid: Grid4) -> Tensor:
    """Return the index of the nearest grid point of every weight, uint8 [N, K] in 0..15. weight: float [N, K]."""
    groups = weight.float().view(*grid.scales.shape, -1)
    return _nearest(groups, grid).to(torch.uint8).view(weight.shape)


def restore_int4(values: Tensor, grid: Grid4) -> Tensor:
    """Dequantize integers [N, K] on their grid to float32 [N, K]."""
    groups = values.float().view(*grid.scales.shape, -1)
    return ((groups - grid.zeros.unsqueeze(2)) * grid.scales.unsqueeze(2)).view(values.shape)


def _grid(low: Tensor, high: Tensor, symmetric: bool) -> Grid4:
    if symmetric:
        scales = _positive(high / 7)
        return Grid4(scales, torch.full_like(scales, 8))
    scales = _positive((high - low) / INT4_LEVELS)
    return Grid4(scales, torch.round(-low / scales).clamp(0, INT4_LEVELS))


def _nearest(groups: Tensor, grid: Grid4) -> Tensor:
    steps = torch.round(groups / grid.scales.unsqueeze(2)) + grid.zeros.unsqueeze(2)
    return steps.clamp_(0, INT4_LEVELS)


def _squared_error(groups: Tensor, grid: Grid4, weights: Tensor | float) -> Tensor:
    restored = (_nearest(groups, grid) - grid.zeros.unsqueeze(2)) * grid.scales.unsqueeze(2)
    return ((restored - groups).square() * weights).sum(2)


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))
