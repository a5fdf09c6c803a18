"""The element-wise part of GeGLU, with or without quantization of the result."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.cpu import calls
from quasar_kernels.gated_mul import gated_mul


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


OP, QUANTIZING = gated_mul("gelu_mul", partial(F.gelu, approximate="tanh"), calls.gelu_mul, calls.gelu_mul_quantize)
