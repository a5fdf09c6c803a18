"""Addition of a layer's output to the residual stream, where no normalization follows at once."""

from __future__ import annotations

from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function


def add_scaled(x: Tensor, update: Tensor, factor: float = 1.0) -> Tensor:
    """Compute ``x + factor * update``, rounded after each of the two operations. x, update: float [M, K]."""
    out: Tensor = OP(x, update, factor)
    return out


def _plain(x: Tensor, update: Tensor, factor: float) -> Tensor:
    return x + update * factor


def _library_takes(x: Tensor, update: Tensor, factor: float) -> bool:
    return calls.fits(x, x.shape[-1])


def _case(setting: Setting) -> Case:
    x, update = setting.normal(setting.rows, setting.layer.hidden), setting.normal(setting.rows, setting.layer.hidden)
    return Case((x, update, 0.25), lambda: _plain(x, update, 0.25), 3 * x.nbytes)


OP = LayerOp(
    "add_scaled",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.add_scaled),
    triton=Kernel(in_16_bit, triton_function("norm", "add_scaled")),
    case=_case,
    check=checks.add_scaled,
)
