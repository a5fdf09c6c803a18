"""The linear layers of `quasar.model.transformer`, and the base class of the quantized layers that replace them."""

from __future__ import annotations

import quasar_kernels
from quasar_kernels import Quantized
from torch import Tensor, nn

Activations = Tensor | Quantized
"""Rows [R, K]: floats, or int8 values with their scales and the dtype of the matmul's output."""


class Linear(nn.Linear):
    """`nn.Linear` that uses the kernel for few rows if the device has one."""

    def forward(self, x: Tensor) -> Tensor:
        return quasar_kernels.linear_dense(x, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """Base class of the linear layers with low-bit weights.

    int8_activations:      whether `forward` quantizes its input to int8. It then also accepts `Quantized` input, which
                           the op before has already quantized
    activation_group_size: number of elements of a row that share a scale; None if the whole row does
    emulated:              whether this device lacks the instructions of the format, so that a pass takes longer than
                           its bytes suggest, and says nothing about the speed of the format
    """

    int8_activations: bool = False
    activation_group_size: int | None = None
    emulated: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes that one pass reads: weights in their storage format, scales and bias."""
        raise NotImplementedError
