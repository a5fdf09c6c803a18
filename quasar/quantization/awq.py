"""AWQ (Lin et al. 2024): scale up the weights of channels with large activations, then clip the range of each group."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar.model.transformer import Block
from quasar.quantization.rounding import CLIPPING, Grid4, grid_int4, restore_int4, round_int4
from quasar.quantization.smoothing import foldable
from quasar.quantization.statistics import LinearStatistics

EXPONENTS = tuple(step / 10 for step in range(11))
# Output rows per clipping search. This bounds its memory.
CLIPPED_ROWS = 512


def awq_scales(
    statistics: LinearStatistics,
    weight: Tensor,
    group_size: int,
    symmetric: bool,
    block: Block,
    layer: str,
) -> Tensor:
    """Return scales ``mean|x|^alpha`` [K], with the alpha in 0 to 1 of least output error on the samples (equation 5).

    weight: float [N, K], the weight of ``layer`` in ``block``
    """
    x, dense = statistics.samples.to(weight.device), weight.float()
    magnitude = statistics.mean_absolute.to(weight.device).clamp(min=1e-6)

    def scales(alpha: float) -> Tensor:
        raw = foldable(block, layer, magnitude**alpha)
        return raw / (raw.max() * raw.min()).sqrt()

    def error(scale: Tensor) -> float:
        scaled = dense * scale
        grid = grid_int4(scaled, group_size, symmetric, clip=False)
        change = restore_int4(round_int4(scaled, grid), grid) / scale - dense
        return float((x @ change.T).square().mean())

    return min((scales(alpha) for alpha in EXPONENTS), key=error)


def clipped_grid(weight: Tensor, samples: Tensor, group_size: int, symmetric: bool) -> Grid4:
    """Return a grid in which the range of each group is clipped if this reduces its output error on the samples.

    The error of a group is ``sum over samples of (x_group · (w - q(w)))²``, computed from the Gram matrix of x_group.

    weight: float [N, K]
    samples: float [S, K], inputs of the layer
    """
    columns = weight.shape[1]
    inputs = samples.to(weight.device).float().view(len(samples), columns // group_size, group_size)
    gram = torch.einsum("sgi,sgj->gij", inputs, inputs)
    parts = [_clip(part.float(), gram, group_size, symmetric) for part in weight.split(CLIPPED_ROWS)]
    return Grid4(torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts]))


def _clip(weight: Tensor, gram: Tensor, group_size: int, symmetric: bool) -> Grid4:
    groups = weight.view(len(weight), -1, group_size)
    best = grid_int4(weight, group_size, symmetric, clip=False)
    least = torch.full_like(best.scales, torch.inf)
    for share in CLIPPING:
        low, high = groups.amin(2, keepdim=True) * share, groups.amax(2, keepdim=True) * share
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        clipped = groups.clamp(low, high)
        grid = grid_int4(clipped.view_as(weight), group_size, symmetric, clip=False)
        change = restore_int4(round_int4(weight, grid), grid).view_as(groups) - groups
        error = torch.einsum("ngi,gij,ngj->ng", change, gram, change)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid4(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
    return best
