"""The argmax of each row, which is the greedy choice of tokens."""

from __future__ import annotations

from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp


def first_maxima(x: Tensor) -> Tensor:
    """Return the argmax of each row, int64 [M]; the first one if several values are largest. x: [M, S] without NaN."""
    out: Tensor = OP(x)
    return out


def _plain(x: Tensor) -> Tensor:
    # This equals `torch.argmax`, which takes four times as long in bfloat16 on a CPU.
    return x.max(-1).indices


def _library_takes(x: Tensor) -> bool:
    return calls.fits(x, x.shape[1])


def _case(setting: Setting) -> Case:
    x = setting.normal(setting.rows, setting.layer.vocabulary)
    return Case((x,), lambda: x.argmax(-1), x.nbytes)


OP = LayerOp(
    "first_maxima",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.first_maxima),
    triton=None,
    case=_case,
    check=checks.first_maxima,
)
