"""Residual addition and RMS normalization, with or without quantization of the result."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import EPS, Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function, triton_groups
from quasar_kernels.reference import quantize_tokens, rms_norm


def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the RMS normalization (Zhang & Sennrich 2019) of ``x + residual``, rounded like separate operations.

    x, residual: float [M, K]; weight: [K]; one_plus: see `reference.rms_norm`. Returns the normalized rows and the sum,
    both [M, K] in the dtype of x.
    """
    out: tuple[Tensor, Tensor] = OP(x, weight, eps, residual, one_plus)
    return out


def add_rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `add_rms_norm`, then `reference.quantize_tokens`: int8 [M, K], scales float32 [M, G], the sum [M, K]."""
    out: tuple[Tensor, Tensor, Tensor] = QUANTIZING(x, weight, eps, residual, one_plus, group_size)
    return out


def _plain(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps, one_plus), total


def _plain_quantizing(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    normalized, total = _plain(x, weight, eps, residual, one_plus)
    return *quantize_tokens(normalized, group_size), total


def _library_takes(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> bool:
    return calls.fits(x, group_size or x.shape[-1]) and weight.dtype == x.dtype


def _triton_quantizes(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    one_plus: bool = False,
    group_size: int | None = None,
) -> bool:
    return in_16_bit(x) and triton_groups(group_size)


def _case(setting: Setting) -> Case:
    x, residual, weight = _operands(setting)
    moved_bytes = 4 * x.nbytes + weight.nbytes
    return Case((x, weight, EPS, residual), lambda: _normalized_by_torch(x, residual, weight), moved_bytes)


def _quantizing_case(setting: Setting) -> Case:
    x, residual, weight = _operands(setting)
    group_size = setting.group_size
    moved_bytes = 3 * x.nbytes + x.numel() + weight.nbytes
    return Case(
        (x, weight, EPS, residual, False, group_size),
        lambda: quantize_tokens(_normalized_by_torch(x, residual, weight), group_size),
        moved_bytes,
    )


def _operands(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = setting.rows, setting.layer.hidden
    return setting.normal(rows, hidden), setting.normal(rows, hidden), setting.normal(hidden)


def _normalized_by_torch(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x + residual, weight.shape, weight, EPS)


OP = LayerOp(
    "add_rms_norm",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.rms_norm),
    triton=Kernel(in_16_bit, triton_function("norm", "add_rms_norm")),
    case=_case,
    check=checks.rms_norm,
)
QUANTIZING = LayerOp(
    "add_rms_norm_quantize",
    plain=_plain_quantizing,
    cpu=Kernel(_library_takes, calls.rms_norm_quantize),
    triton=Kernel(_triton_quantizes, triton_function("norm", "add_rms_norm_quantize")),
    case=_quantizing_case,
    check=checks.rms_norm,
)
