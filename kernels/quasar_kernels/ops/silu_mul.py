"""The element-wise part of SwiGLU, with or without quantization of the result."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.cpu import calls
from quasar_kernels.gated_mul import gated_mul


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up`` (SwiGLU, Shazeer 2020), rounded after each of the two operations.

    gate_up: float [M, 2 S], the gates first. Returns [M, S] in its dtype.
    """
    out: Tensor = OP(gate_up)
    return out


def silu_mul_quantize(gate_up: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute `silu_mul`, then `reference.quantize_tokens`: int8 [M, S] and float32 scales [M, G]."""
    out: tuple[Tensor, Tensor] = QUANTIZING(gate_up, group_size)
    return out


OP, QUANTIZING = gated_mul("silu_mul", F.silu, calls.silu_mul, calls.silu_mul_quantize)
