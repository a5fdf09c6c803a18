"""Arguments that the ops between the matmuls are measured and checked with: the layers of real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quasar_kernels.reference import quantize_slots
from quasar_kernels.slots import QuantizedSlots, Slots

EPS = 1e-6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    """Sizes of a decoder layer. head_norms: whether queries and keys are normalized (Qwen3)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool
    vocabulary: int


LAYERS = {
    "smollm2-135m": Layer(576, 1536, 9, 3, 64, False, 49152),
    "qwen3-0.6b": Layer(1024, 3072, 16, 8, 128, True, 151936),
    "qwen3-8b": Layer(4096, 12288, 32, 8, 128, True, 151936),
}


@dataclass(frozen=True)
class Setting:
    """A block of rows in a layer.

    context: number of cached tokens before the block
    group_size: group size of quantized results; None for one scale per row
    """

    layer: Layer
    rows: int
    context: int = 0
    group_size: int | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int) -> Tensor:
        """Return random values in the dtype of the setting."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def slots(self, capacity: int, bits: int) -> Slots:
        """Return random keys or values of the layer, in the dtype of the setting or quantized to 8 or 4 bits."""
        rows = self.normal(self.layer.kv_heads, capacity, self.layer.head_dim)
        if bits == 16:
            return rows
        return QuantizedSlots(*quantize_slots(rows, bits))


@dataclass(frozen=True)
class Case:
    """Arguments of an op, and the computation that it is compared with.

    peer: PyTorch's own call that computes the same
    moved_bytes: what the op must read and write
    """

    arguments: tuple[Any, ...]
    peer: Callable[[], object]
    moved_bytes: int
