"""What every reader of packed checkpoints makes of a linear layer, whatever the format on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """Quantized rows of one linear layer, ``(values - zeros) * scales``.

    values: uint8 [N, K] in 0..15 for 4 bits, int8 [N, K] for 8 bits
    scales, zeros: float32 [N, G], of G groups of consecutive inputs; zeros need not be whole numbers
    symmetric: every zero is the middle of the range
    quantized_inputs: 8 bits: made for int8 activations per token
    """

    bits: Literal[4, 8]
    values: Tensor
    scales: Tensor
    zeros: Tensor
    symmetric: bool
    quantized_inputs: bool = False
