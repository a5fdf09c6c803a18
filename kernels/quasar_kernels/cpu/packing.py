"""Packs weights in the order in which the kernels read them.

Sixteen outputs form a block. Within a block the 32-bit units of the outputs are interleaved, [N / 16, units, 16], so
that one 64-byte vector contains the same unit of sixteen outputs, and a block is one contiguous stream. A unit is four
int8 (stored as w + 128), two bfloat16, one float32, or eight 4-bit integers: inputs 0 to 3 in the low halves of its
bytes, 4 to 7 in the high halves. Scales and zero points of groups are in the same blocks, [N / 16, groups, 16].
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from quasar_kernels.cpu.library import Library, backend
from quasar_kernels.reference import pack_int4 as pack_nibbles
from quasar_kernels.reference import unpack_int4 as unpack_nibbles

BLOCK_OUTPUTS = 16
INPUTS_MULTIPLE = 32
# With more inputs the integer sums would overflow int32. In larger groups a sum would not be exact in float32.
MAX_INPUTS = 1 << 17
MAX_GROUP_SIZE = 1 << 13
SIGN_BIT = -128
SYMMETRIC_ZERO = 8
NIBBLES = 16

SCALE_FLOAT32, SCALE_FLOAT16 = 0, 1
ZERO_EIGHT, ZERO_NIBBLE, ZERO_FLOAT32 = 0, 1, 2


class _Structure(ctypes.Structure):
    """The structure `Weight` of interface.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scale_unit", ctypes.c_float),
        ("scale_kind", ctypes.c_int32),
        ("zero_kind", ctypes.c_int32),
    )


class PackedWeight:
    """A packed weight and its description for the library.

    values: int32 [N / 16, units, 16]; scales: float32 [N] for int8, or float32 or float16 [N / 16, groups, 16];
    zeros: uint8 [N / 16, groups, 8] (two 4-bit zero points per byte), float32 [N / 16, groups, 16], or None if all are
    8. The groups have ``group_size`` inputs; those of int8 weights are groups of the activations, and 0 stands for
    none. Every scale is multiplied by ``scale_unit``, a power of two. The tensors must not be resized or moved.
    """

    def __init__(
        self,
        values: Tensor,
        inputs: int,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        group_size: int = 0,
        scale_unit: float = 1.0,
    ) -> None:
        self.values, self.scales, self.zeros = values, scales, zeros
        self.outputs, self.inputs = values.shape[0] * BLOCK_OUTPUTS, inputs
        self.group_size, self.scale_unit = group_size, scale_unit
        scaled_by_group = scales is not None and scales.dim() == 3
        groups = self.outputs * (inputs // group_size if scaled_by_group else 1)
        for part, expected in (
            (scales, groups),
            (zeros, groups // 2 if zeros is not None and zeros.dtype == torch.uint8 else groups),
        ):
            if part is not None and (part.numel() != expected or not part.is_contiguous()):
                raise ValueError(f"expected {expected} scales and zero points without gaps, got {list(part.shape)}")
        zero_kind = ZERO_EIGHT if zeros is None else ZERO_NIBBLE if zeros.dtype == torch.uint8 else ZERO_FLOAT32
        self._structure = _Structure(
            self.outputs,
            inputs,
            group_size,
            values.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            scale_unit,
            SCALE_FLOAT16 if scales is not None and scales.dtype == torch.float16 else SCALE_FLOAT32,
            zero_kind,
        )
        self.address = ctypes.addressof(self._structure)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None)


def packable(outputs: int, inputs: int, group_size: int = INPUTS_MULTIPLE) -> bool:
    """Return whether the kernels take a weight of this shape."""
    return (
        outputs % BLOCK_OUTPUTS == 0
        and inputs % INPUTS_MULTIPLE == 0
        and 0 < inputs <= MAX_INPUTS
        and group_size % INPUTS_MULTIPLE == 0
        and group_size <= MAX_GROUP_SIZE
    )


def pack_int8(values: Tensor, scales: Tensor, group_size: int = 0) -> PackedWeight:
    """Pack values, int8 [N, K], with scales, float32 [N].

    group_size: inputs that share a scale of the int8 activations; 0 if all inputs of a token do
    """
    units = _pack_units(values ^ SIGN_BIT)
    return PackedWeight(units, values.shape[1], scales.float().contiguous(), group_size=group_size)


def unpack_int8(weight: PackedWeight) -> Tensor:
    """Return the packed values, int8 [N, K]."""
    return _unpack_units(weight.values, torch.int8) ^ SIGN_BIT


def pack_dense(values: Tensor) -> PackedWeight:
    """Pack values, bfloat16 or float32 [N, K]."""
    return PackedWeight(_pack_units(values), values.shape[1])


def unpack_dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the packed values [N, K]. dtype: the dtype that was packed."""
    return _unpack_units(weight.values, dtype)


def unpack_dense_rows(weight: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows with the indices ``rows``, int64 [R], as [R, K]. dtype: the dtype that was packed."""
    blocks = torch.div(rows, BLOCK_OUTPUTS, rounding_mode="floor")
    return weight.values[blocks, :, rows % BLOCK_OUTPUTS].contiguous().view(dtype)


def pack_int4(packed: Tensor, scales: Tensor, zeros: Tensor, scale_unit: float | None) -> PackedWeight:
    """Pack uint8 [N, K / 2] as in `reference.pack_int4`, with scales and zeros, float32 [N, K / group_size].

    With a ``scale_unit`` the scales are stored as float16 multiples of it, otherwise as float32.
    """
    inputs = packed.shape[1] * 2
    group_size = inputs // scales.shape[1]
    octets = unpack_nibbles(packed).view(len(packed), -1, 2, 4)
    values = _pack_units((octets[:, :, 0] | (octets[:, :, 1] << 4)).flatten(1))
    stored = scales.float() if scale_unit is None else (scales / scale_unit).half()
    return PackedWeight(values, inputs, _pack_groups(stored), _pack_zeros(zeros.float()), group_size, scale_unit or 1.0)


def unpack_int4(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return what was packed: uint8 [N, K / 2], and scales and zeros, float32 [N, K / group_size]."""
    assert weight.scales is not None
    octets = _unpack_units(weight.values, torch.uint8).view(weight.outputs, -1, 4)
    values = torch.stack([octets & 0xF, octets >> 4], dim=2).flatten(1)
    scales = _unpack_groups(weight.scales).float() * weight.scale_unit
    if weight.zeros is None:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    elif weight.zeros.dtype == torch.uint8:
        zeros = _unpack_groups(unpack_nibbles(weight.zeros.flatten(0, 1)).view(weight.scales.shape)).float()
    else:
        zeros = _unpack_groups(weight.zeros)
    return pack_nibbles(values), scales, zeros


def float16_scale_unit(scales: Tensor) -> float:
    """Return the power of two u for which the largest scale divided by u is in [2^14, 2^15).

    The smallest normal float16 is then 2^-29 of the largest scale.
    """
    largest = scales.abs().amax().item()
    return 2.0 ** (math.frexp(largest)[1] - 15) if largest > 0 else 1.0


def _pack_units(values: Tensor) -> Tensor:
    units = values.contiguous().view(torch.int32)
    blocks = units.view(len(units) // BLOCK_OUTPUTS, BLOCK_OUTPUTS, -1).transpose(1, 2)
    out = torch.empty(blocks.shape, dtype=torch.int32)
    library: Library | None = backend()
    if library is not None:
        library.ask_for_huge_pages(out)
    return out.copy_(blocks)


def _unpack_units(units: Tensor, dtype: torch.dtype) -> Tensor:
    return units.transpose(1, 2).flatten(0, 1).contiguous().view(dtype)


def _pack_groups(values: Tensor) -> Tensor:
    return values.view(len(values) // BLOCK_OUTPUTS, BLOCK_OUTPUTS, -1).transpose(1, 2).contiguous()


def _unpack_groups(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(0, 1).contiguous()


def _pack_zeros(zeros: Tensor) -> Tensor | None:
    if bool((zeros == SYMMETRIC_ZERO).all()):
        return None
    blocks = _pack_groups(zeros)
    small_integers = (blocks == blocks.round()) & (blocks >= 0) & (blocks < NIBBLES)
    if not bool(small_integers.all()):
        return blocks
    return pack_nibbles(blocks.to(torch.uint8).flatten(0, 1)).view(*blocks.shape[:2], BLOCK_OUTPUTS // 2)
