"""A 4-bit layer that exists in the kernels' form only, which a random model of 8 billion weights is drawn in."""

from __future__ import annotations

from quasar_kernels.triton import ops
from quasar_kernels.triton.int4_packing import PackedInt4
from torch import Tensor, nn


class PackedW4Linear(nn.Module):
    """16-bit activations; weights as `quasar_kernels.triton.int4_packing` lays them out."""

    def __init__(self, weight: PackedInt4, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_w4a16(x, self.weight, self.bias)
