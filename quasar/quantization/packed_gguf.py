"""Reads the quantized tensors of GGUF files without dequantizing them.

Types with blocks of 32 inputs (Q4_0, Q8_0 …) have a float16 scale, and some a minimum, in every block. K-quants and
IQ4_XS have super-blocks of 256 inputs: a group of 16 or 32 inputs has an integer of 4 to 8 bits, and the super-block a
float16 number that all of its integers are multiplied with. Both stay as they are stored, so that nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from quasar_kernels import GroupNumbers
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.gguf_file import GGUFFile
from quasar.model.grid import FLOAT_TYPES
from quasar.quantization.packed_blocks import MIDDLE, BlockRows

BLOCK = 32
# The values of the 4-bit integers of IQ4_NL and IQ4_XS.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class GGUFCheckpoint:
    """Implements `PackedCheckpoint` for a GGUF file.

    Raises RequestError as `GGUFFile` does, which requires that the file has no tensors besides those of the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.config = self._file.config

    def __contains__(self, name: str) -> bool:
        return name in self._file.shapes

    def dense(self, name: str) -> Tensor:
        return self._file.dense(name)

    def packed(self, name: str) -> BlockRows | None:
        tensor = self._file.tensor(name)
        kind = tensor.tensor_type.name
        if kind in FLOAT_TYPES:
            return None
        if kind not in READERS:
            self._file.dense(name)  # raises the error of a type that nothing can read
            raise RequestError(
                f"{self.path}: tensor {tensor.name} is {kind}; only {', '.join(READERS)} can stay quantized. "
                f"Pass model=path model.path={self.path} to dequantize the file"
            )
        stored = torch.from_numpy(np.array(tensor.data, dtype=np.uint8)).view(int(tensor.shape[1]), -1)
        rows = READERS[kind](stored)
        for numbers in (rows.scales, rows.minimums):
            if numbers is not None and not numbers.values.isfinite().all():
                raise RequestError(
                    f"{self.path}: tensor {tensor.name} has scales that are NaN or infinite; download the file again"
                )
        return rows.mapped(lambda part: self._file.in_order(name, part))

    def require_all_read(self) -> None:
        """Do nothing: `GGUFFile` has compared the tensors with the metadata."""


def _q8_0(stored: Tensor) -> BlockRows:
    scale, values = _fields(stored, 2, BLOCK)
    return BlockRows(8, values.contiguous().view(torch.int8).flatten(1), _halves(scale))


def _q4_0(stored: Tensor) -> BlockRows:
    scale, nibbles = _fields(stored, 2, BLOCK // 2)
    return BlockRows(4, _planes(nibbles, 4).flatten(1), _halves(scale))


def _q4_1(stored: Tensor) -> BlockRows:
    scale, offset, nibbles = _fields(stored, 2, 2, BLOCK // 2)
    scales, minimums = _halves(scale), _negative(_halves(offset))
    symmetric = torch.equal(minimums.values.float(), MIDDLE * scales.values.float())
    return BlockRows(4, _planes(nibbles, 4).flatten(1), scales, None if symmetric else minimums)


def _q5_0(stored: Tensor) -> BlockRows:
    scale, high, nibbles = _fields(stored, 2, 4, BLOCK // 2)
    values = _planes(nibbles, 4) | _bits_in_order(high) << 4
    return BlockRows(8, (values.to(torch.int8) - 16).flatten(1), _halves(scale))


def _q5_1(stored: Tensor) -> BlockRows:
    scale, offset, high, nibbles = _fields(stored, 2, 2, 4, BLOCK // 2)
    values = _planes(nibbles, 4) | _bits_in_order(high) << 4
    return BlockRows(8, values.to(torch.int8).flatten(1), _halves(scale), _negative(_halves(offset)))


def _iq4_nl(stored: Tensor) -> BlockRows:
    scale, nibbles = _fields(stored, 2, BLOCK // 2)
    return BlockRows(8, _nonlinear(_planes(nibbles, 4)).flatten(1), _halves(scale))


def _q2_k(stored: Tensor) -> BlockRows:
    """Groups of 16 inputs; a byte has a scale in its low half and a minimum in its high half."""
    factors, quarters, scale, minimum = _fields(stored, 16, 64, 2, 2)
    values = _planes(quarters.unflatten(2, (2, 32)), 2)
    return BlockRows(4, values.flatten(1), _halves(scale, factors & 0xF), _halves(minimum, factors >> 4))


def _q3_k(stored: Tensor) -> BlockRows:
    """Groups of 16 inputs; the third bit of a value is stored inverted."""
    high, quarters, factors, scale = _fields(stored, 32, 64, 12, 2)
    low = _planes(quarters.unflatten(2, (2, 32)), 2).flatten(2)
    values = low + 4 * _planes(high, 1).flatten(2) + (MIDDLE - 4)
    upper = _planes(factors[:, :, 8:], 2).flatten(2) << 4
    of_groups = (_planes(factors[:, :, :8], 4).flatten(2) | upper).to(torch.int8) - 32
    return BlockRows(4, values.flatten(1), _halves(scale, of_groups))


def _q4_k(stored: Tensor) -> BlockRows:
    scale, minimum, factors, nibbles = _fields(stored, 2, 2, 12, 128)
    of_scales, of_minimums = _six_bits(factors)
    values = _planes(nibbles.unflatten(2, (4, 32)), 4)
    return BlockRows(4, values.flatten(1), _halves(scale, of_scales), _halves(minimum, of_minimums))


def _q5_k(stored: Tensor) -> BlockRows:
    scale, minimum, factors, high, nibbles = _fields(stored, 2, 2, 12, 32, 128)
    of_scales, of_minimums = _six_bits(factors)
    values = _planes(nibbles.unflatten(2, (4, 32)), 4).flatten(2) | _planes(high, 1).flatten(2) << 4
    return BlockRows(8, values.to(torch.int8).flatten(1), _halves(scale, of_scales), _halves(minimum, of_minimums))


def _q6_k(stored: Tensor) -> BlockRows:
    """Groups of 16 inputs with int8 scales."""
    low, high, factors, scale = _fields(stored, 128, 64, 16, 2)
    nibbles = _planes(low.unflatten(2, (2, 64)), 4).flatten(2)
    values = nibbles | _planes(high.unflatten(2, (2, 32)), 2).flatten(2) << 4
    return BlockRows(8, (values.to(torch.int8) - 32).flatten(1), _halves(scale, factors.contiguous().view(torch.int8)))


def _iq4_xs(stored: Tensor) -> BlockRows:
    scale, high, low, nibbles = _fields(stored, 2, 2, 4, 128)
    # Of the six bits of a factor, four are in half a byte of `low`, and two in one of the quarters of `high`.
    lower = torch.stack([low & 0xF, low >> 4], dim=3).flatten(2)
    upper = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=3).flatten(2)
    values = _nonlinear(_planes(nibbles.unflatten(2, (8, 16)), 4))
    return BlockRows(8, values.flatten(1), _halves(scale, (lower | upper << 4).to(torch.int8) - 32))


READERS: dict[str, Callable[[Tensor], BlockRows]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
"""The types that stay quantized, and the function that reads rows of them, uint8 [N, bytes]."""


def _fields(stored: Tensor, *sizes: int) -> list[Tensor]:
    """Divide the blocks of rows into fields: uint8 [N, blocks, size] each."""
    return list(stored.view(len(stored), -1, sum(sizes)).split(sizes, dim=2))


def _planes(packed: Tensor, bits: int) -> Tensor:
    """Unpack values of 1, 2 or 4 bits, uint8 [..., C] to [..., 8 / bits, C].

    The lowest bits of all bytes come first, as in ``[0x21, 0x43]``, whose values of 4 bits are ``[[1, 3], [2, 4]]``.
    """
    return torch.stack([packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=-2)


def _bits_in_order(packed: Tensor) -> Tensor:
    """Return the bits of four bytes in the form of `_planes` of 16 bytes: uint8 [N, blocks, 2, 16]."""
    bits = torch.stack([packed >> shift & 1 for shift in range(8)], dim=3)
    return bits.flatten(2).unflatten(2, (2, BLOCK // 2))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the scales and the minimums of eight groups from twelve bytes: uint8 [N, blocks, 8] each.

    The first four of each are the low six bits of a byte; of the other four, the high two bits are in these bytes.
    """
    scales, minimums, rest = packed.split(4, dim=2)
    return (
        torch.cat([scales & 0x3F, rest & 0xF | scales >> 2 & 0x30], dim=2),
        torch.cat([minimums & 0x3F, rest >> 4 | minimums >> 2 & 0x30], dim=2),
    )


def _nonlinear(indices: Tensor) -> Tensor:
    return torch.tensor(NONLINEAR, dtype=torch.int8)[indices.long()]


def _halves(field: Tensor, factors: Tensor | None = None) -> GroupNumbers:
    """Read the float16 number of every block. factors: [N, blocks, groups of a block], which multiply it."""
    values = field.contiguous().view(torch.float16).squeeze(2)
    return GroupNumbers(values, None if factors is None else factors.to(torch.int8).flatten(1))


def _negative(numbers: GroupNumbers) -> GroupNumbers:
    return GroupNumbers(-numbers.values, numbers.factors)
