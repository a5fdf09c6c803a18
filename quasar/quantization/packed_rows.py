"""What every reader of packed checkpoints makes of a linear layer, whatever the format on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """Quantized rows of one linear layer, ``(values - zeros) * scales``.

    values: uint8 [N, K] in 0..15 for 4 bits, int8 or float8_e4m3fn [N, K] for 8 bits
    scales, zeros: float32 [N, G], of G groups of consecutive columns; zeros need not be whole numbers
    symmetric: every zero is the middle of the range
    quantized_inputs: made for 8-bit activations: of FP8 weights in FP8 per token, of 4-bit weights in int8 and in the
        groups of the weights, of int8 weights in int8 per token or in groups of ``input_group``
    order: int64 [K], the input that each column is multiplied with, or None if it is that of the same index
    input_group: number of inputs that share a scale; 0 if all of a token do
    """

    bits: Literal[4, 8]
    values: Tensor
    scales: Tensor
    zeros: Tensor
    symmetric: bool
    quantized_inputs: bool = False
    order: Tensor | None = None
    input_group: int = 0

    def restored(self) -> Tensor:
        """Return the dequantized weight, float32 [N, K], with its inputs in the model's order."""
        groups = self.values.float().view(*self.scales.shape, -1)
        weight = ((groups - self.zeros.unsqueeze(2)) * self.scales.unsqueeze(2)).view(self.values.shape)
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order, weight)
