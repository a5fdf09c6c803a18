"""GPTQ (Frantar et al. 2023): quantize column by column, and correct later columns for the error of earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar.errors import QuasarError
from quasar.quantization.rounding import INT4_LEVELS, INT8_MAX, Grid4

# Columns that are corrected immediately. The corrections of later columns are batched (section 3.3, step 2).
BLOCK_COLUMNS = 128
# The paper's 0.01 is for 128 long calibration texts. A few thousand tokens give a less accurate Hessian.
DAMPING = 0.05


def gptq_int4(weight: Tensor, hessian: Tensor, grid: Grid4, damping: float = DAMPING, reorder: bool = True) -> Tensor:
    """Quantize ``weight`` to 4-bit integers on a fixed grid in groups. Returns uint8 [N, K] in 0..15.

    grid: scales and zeros [N, K / group_size]; the other arguments and errors are those of `gptq`
    """
    return gptq(weight, hessian, grid.scales, grid.zeros, (0, INT4_LEVELS), damping, reorder).to(torch.uint8)


def gptq_int8(weight: Tensor, hessian: Tensor, scales: Tensor, damping: float = DAMPING) -> Tensor:
    """Quantize ``weight`` to int8 with a fixed scale per output channel. Returns int8 [N, K] in -127..127.

    scales: float32 [N]; the other arguments and errors are those of `gptq`
    """
    columns = scales.unsqueeze(1)
    return gptq(weight, hessian, columns, torch.zeros_like(columns), (-INT8_MAX, INT8_MAX), damping).to(torch.int8)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    limits: tuple[int, int],
    damping: float = DAMPING,
    reorder: bool = True,
) -> Tensor:
    """Quantize ``weight`` on the grid ``(q - zero) * scale``, minimizing the output error ``tr((Q - W) H (Q - W)^T)``.

    Returns the integers q, float32 [N, K]. Raises QuasarError if the Hessian is not finite.

    weight: float [N, K]
    hessian: float32 [K, K], ``X^T X`` of the calibration inputs X
    scales, zeros: float32 [N, G], for groups of K / G inputs
    limits: the smallest and the largest q
    damping: share of the mean diagonal that is added to the diagonal (section 3.3, step 3)
    reorder: whether columns with a large diagonal entry are quantized first, each on the grid of its group
    """
    if not hessian.isfinite().all():
        raise QuasarError("the Hessian of a layer's inputs is NaN or infinite")
    columns = weight.shape[1]
    # The weight is transposed, so that its columns are contiguous.
    remaining = weight.float().T.contiguous()
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    remaining[dead] = 0.0
    diagonal += damping * diagonal.mean()
    order = diagonal.argsort(descending=True) if reorder else torch.arange(columns, device=weight.device)
    remaining, hessian = remaining[order], hessian[order][:, order]
    scales = _per_column(scales, columns)[order]
    zeros = _per_column(zeros, columns)[order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)

    values = torch.empty_like(remaining)
    errors = torch.empty_like(remaining[:BLOCK_COLUMNS])
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        for column in range(start, end):
            scale, zero, target = scales[column], zeros[column], remaining[column]
            rounded = torch.round(target / scale).add_(zero).clamp_(*limits)
            values[column] = rounded
            error = errors[column - start]
            torch.sub(target, rounded.sub_(zero).mul_(scale), out=error).div_(inverse[column, column])
            remaining[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1)
        remaining[end:].addmm_(inverse[start:end, end:].T, errors[: end - start], alpha=-1)
    return values[order.argsort()].T.contiguous()


def _per_column(groups: Tensor, columns: int) -> Tensor:
    """Expand values per group, [N, groups], to values per column, contiguous [K, N]."""
    return groups.T.repeat_interleave(columns // groups.shape[1], dim=0)
