"""The inputs of each row in another order, for weights whose groups are not of consecutive inputs (act-order)."""

from __future__ import annotations

import torch
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp
from quasar_kernels.weights import InputOrder


def select_inputs(x: Tensor, order: InputOrder) -> Tensor:
    """Return rows [M, K] whose element k is element ``order.indices[k]`` of the row in x. x: float [M, K].

    >>> select_inputs(torch.tensor([[10.0, 20.0, 30.0]]), InputOrder(torch.tensor([2, 0, 1]))).tolist()
    [[30.0, 10.0, 20.0]]
    """
    out: Tensor = OP(x, order)
    return out


def _plain(x: Tensor, order: InputOrder) -> Tensor:
    return x.index_select(1, order.indices)


def _library_takes(x: Tensor, order: InputOrder) -> bool:
    return calls.fits(x, x.shape[1], multiple=1)


def _case(setting: Setting) -> Case:
    x = setting.normal(setting.rows, setting.layer.hidden)
    indices = torch.randperm(setting.layer.hidden, device=setting.device)
    return Case((x, InputOrder(indices)), lambda: x.index_select(1, indices), 2 * x.nbytes + indices.nbytes)


OP = LayerOp(
    "select_inputs",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.select_inputs),
    triton=None,
    case=_case,
    check=checks.select_inputs,
)
