"""The linear layers that `quasar.model.transformer` is built from, and the base of those that replace them."""

from __future__ import annotations

import quasar_kernels
from quasar_kernels import Quantized
from torch import Tensor, nn

Activations = Tensor | Quantized
"""Rows [R, K]: floats, or int8 with their scales and the dtype that a product with them has."""


class Linear(nn.Linear):
    """`nn.Linear` by the kernel for few rows, where the device has one."""

    def forward(self, x: Tensor) -> Tensor:
        return quasar_kernels.linear_dense(x, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """Base of the linear layers with low-bit weights.

    int8_activations:      whether `forward` rounds its input to int8. It then takes `Quantized` input too, and the op
                           that computes the input does the rounding.
    activation_group_size: elements of a row that share a scale; None: all
    """

    int8_activations: bool = False
    activation_group_size: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes that one pass reads: weights in their format, scales, bias."""
        raise NotImplementedError
