"""The element-wise part of GeGLU, with or without quantization of the result."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import checks
from quasar_kernels.cases import Case, Setting
from quasar_kernels.cpu import calls
from quasar_kernels.dispatch import Kernel, LayerOp, in_16_bit, triton_function, triton_groups
from quasar_kernels.reference import quantize_tokens


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Compute ``gelu(gate) * up`` (GeGLU, Shazeer 2020), rounded after each of the two operations.

    GELU is its approximation by tanh (Hendrycks & Gimpel 2016), which Gemma uses.

    gate_up: float [M, 2 S], the gates first. Returns [M, S] in its dtype.
    """
    out: Tensor = OP(gate_up)
    return out


def gelu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute `gelu_mul`, then `reference.quantize_tokens`: int8 [M, S] and float32 scales [M, G]."""
    out: tuple[Tensor, Tensor] = QUANTIZING(gate_up, group_size)
    return out


def _plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _plain_quantizing(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    return quantize_tokens(_plain(gate_up), group_size)


def _library_takes(gate_up: Tensor, group_size: int | None = None) -> bool:
    return calls.fits(gate_up, group_size or gate_up.shape[1] // 2)


def _triton_quantizes(gate_up: Tensor, group_size: int | None = None) -> bool:
    return in_16_bit(gate_up) and triton_groups(group_size)


def _case(setting: Setting) -> Case:
    gate_up = setting.normal(setting.rows, 2 * setting.layer.intermediate)
    return Case((gate_up,), lambda: _plain(gate_up), gate_up.nbytes * 3 // 2)


def _quantizing_case(setting: Setting) -> Case:
    gate_up = setting.normal(setting.rows, 2 * setting.layer.intermediate)
    arguments = gate_up, setting.group_size
    return Case(arguments, lambda: _plain_quantizing(*arguments), gate_up.nbytes * 5 // 4)


OP = LayerOp(
    "gelu_mul",
    plain=_plain,
    cpu=Kernel(_library_takes, calls.gelu_mul),
    triton=Kernel(in_16_bit, triton_function("activation", "gelu_mul")),
    case=_case,
    check=checks.gated_mul,
)
QUANTIZING = LayerOp(
    "gelu_mul_quantize",
    plain=_plain_quantizing,
    cpu=Kernel(_library_takes, calls.gelu_mul_quantize),
    triton=Kernel(_triton_quantizes, triton_function("activation", "gelu_mul_quantize")),
    case=_quantizing_case,
    check=checks.gated_mul,
)
