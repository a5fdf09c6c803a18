"""Keys or values in the slots of a KV cache: floats, or integers of 8 or 4 bits.

Keys and values are quantized by token and head, so a slot does not depend on other slots: a rollback or a compaction
moves it as it is, and a row of a pass has the same keys and values in every draft. Keys have a few channels that are
much larger than the others, which would take up the range of the others. `rotary_write` therefore multiplies queries
and keys by a Hadamard matrix, which spreads these channels and does not change the products of queries and keys
(QuaRot, Ashkboos et al. 2024). One scale per channel and group of tokens (KIVI, Liu et al. 2024) treats these channels
better: on SmolLM2-135M, 4-bit keys have a KL divergence of 0.022 with it in groups of 32 tokens, of 0.047 with the
rotation, and of 0.077 without (546 tokens). But whether a token is quantized then depends on how many follow it, it
would be quantized differently in each branch of a tree, and a rollback into a group needs the numbers before rounding.
In 8 bit the divergence is 0.0004 with the rotation and 0.0015 without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from quasar_kernels import reference


@dataclass(frozen=True)
class QuantizedSlots:
    """Quantized keys or values of a layer.

    codes:  int8 [H_kv, capacity, D], or uint8 [H_kv, capacity, D / 2], see `reference.quantize_slots`
    scales: float32 [H_kv, capacity, 1], or float16 [H_kv, capacity, 2 G], likewise

    The shape is that of the dequantized tensor, [H_kv, capacity, D].
    """

    codes: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @staticmethod
    def zeros(shape: tuple[int, int, int], bits: int, device: torch.device | str = "cpu") -> QuantizedSlots:
        """Return slots of zeros for keys or values [H_kv, capacity, D]. bits: 8 or 4."""
        return QuantizedSlots(*slot_storage(shape, bits, device))

    @property
    def shape(self) -> tuple[int, int, int]:
        heads, capacity, width = self.codes.shape
        return heads, capacity, width * 8 // self.bits

    @property
    def largest_step(self) -> float:
        """The largest distance of two neighbouring numbers, relative to the largest magnitude of a row."""
        return 1 / reference.INT8_MAX if self.bits == 8 else 2 / reference.UINT4_MAX

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def data_ptr(self) -> int:
        return self.codes.data_ptr()

    def first(self, slots: int) -> QuantizedSlots:
        """Return the first ``slots`` slots of every head, as views."""
        return QuantizedSlots(self.codes[:, :slots], self.scales[:, :slots])

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Quantize ``rows``, float [H_kv, R, D], to the slots, int64 [R]."""
        codes, scales = reference.quantize_slots(rows, self.bits)
        self.codes.index_copy_(1, slots, codes)
        self.scales.index_copy_(1, slots, scales)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the elements, [H_kv, capacity, D], rounded from float32 to ``dtype``."""
        return reference.dequantize_slots(self.codes, self.scales).to(dtype)


Slots: TypeAlias = Tensor | QuantizedSlots
"""Keys or values of a layer: a float tensor [H_kv, capacity, D], or quantized."""


def slot_storage(shape: tuple[int, ...], bits: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return codes and scales, all zero, for keys or values of ``shape`` [..., D] in ``bits`` bits, 8 or 4."""
    *leading, head_dim = shape
    if bits == 8:
        numbers, dtypes = (head_dim, 1), (torch.int8, torch.float32)
    else:
        numbers, dtypes = (head_dim // 2, 2 * reference.slot_groups(head_dim)), (torch.uint8, torch.float16)
    codes, scales = (
        torch.zeros(*leading, number, dtype=dtype, device=device) for number, dtype in zip(numbers, dtypes, strict=True)
    )
    return codes, scales
