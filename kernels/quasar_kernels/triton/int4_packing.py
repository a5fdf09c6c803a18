"""The form in which the 4-bit kernels read a weight.

A group of g inputs takes g / 2 bytes. Byte j contains input j in its low half and input j + g / 2 in its high half, so
that a program multiplies two contiguous runs of activations and needs no interleaving. The halves are ``q - 8`` in
two's complement. The bytes of a group are contiguous for 16 outputs, so that a program reads a group in a few long runs
of 16-byte loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import reference
from quasar_kernels.cpu.packing import float16_scale_unit

OUTPUTS_PER_TILE = 16
MIDDLE = 8


@dataclass(frozen=True)
class PackedInt4:
    """A 4-bit weight ``(q - zero) * scale`` for the GPU.

    values: uint8 [N / 16 rounded up, K / g, 16, g / 2]
    scales: float16 [K / g, N], or float32 if float16 does not hold them, to be multiplied by ``unit``
    zeros:  ``zero - 8``, int8 or (where fractional) float16 or float32 [K / g, N]; None if all are 0 (a symmetric grid)
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    unit: float
    outputs: int
    inputs: int

    @property
    def group_size(self) -> int:
        return self.inputs // len(self.scales)

    @property
    def nbytes(self) -> int:
        """The number of bytes that a matmul reads."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def canonical(self) -> Tensor:
        """Return the 4-bit integers in the form that `pack_int4` takes: uint8 [N, K / 2]."""
        rows = self.values.transpose(1, 2).flatten(0, 1)[: self.outputs]
        groups = torch.cat([rows & 0xF, rows >> 4], dim=2) ^ MIDDLE
        return reference.pack_int4(groups.flatten(1))


def pack_int4(packed: Tensor, scales: Tensor, zeros: Tensor) -> PackedInt4:
    """Repack a weight in canonical form: uint8 [N, K / 2] as in `reference.pack_int4`, scales and zeros [N, K / g].

    Nothing is rounded: scales are float16 times a power of two chosen for the matrix if that holds them, else float32.
    """
    outputs, groups = scales.shape
    values = reference.unpack_int4(packed).view(outputs, groups, -1) ^ MIDDLE
    low, high = values.chunk(2, dim=2)
    tiled = F.pad(low | (high << 4), (0, 0, 0, 0, 0, -outputs % OUTPUTS_PER_TILE))
    tiled = tiled.view(-1, OUTPUTS_PER_TILE, groups, low.shape[2]).transpose(1, 2).contiguous()
    unit = float16_scale_unit(scales)
    offsets: Tensor | None = (zeros - MIDDLE).float().T.contiguous()
    assert offsets is not None
    if not offsets.any():
        offsets = None
    elif torch.equal(offsets, offsets.round()):
        offsets = offsets.to(torch.int8)
    else:
        offsets = _compact(offsets)
    return PackedInt4(tiled, _compact(scales.T.float() / unit), offsets, unit, outputs, packed.shape[1] * 2)


def _compact(numbers: Tensor) -> Tensor:
    halves = numbers.half().contiguous()
    return halves if torch.equal(halves.float(), numbers) else numbers.contiguous()
