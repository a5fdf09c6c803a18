"""Packs weights in the order in which the kernels read them.

Sixteen outputs form a block. Within a block the 32-bit units of the outputs are interleaved, [N / 16, units, 16], so
that one 64-byte vector contains the same unit of sixteen outputs, and a block is one contiguous stream. A unit is four
int8 (stored as w + 128), two bfloat16, one float32, or eight 4-bit integers: inputs 0 to 3 in the low halves of its
bytes, 4 to 7 in the high halves. Scales, zero points and minimums of groups are in the same blocks,
[N / 16, groups, 16].
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels.cpu.library import Library, backend
from quasar_kernels.group_numbers import GroupNumbers
from quasar_kernels.reference import pack_int4 as pack_nibbles
from quasar_kernels.reference import unpack_int4 as unpack_nibbles
from quasar_kernels.reference import zero_points

BLOCK_OUTPUTS = 16
INPUTS_MULTIPLE = 32
GROUP_MULTIPLE = 16
# With more inputs the integer sums would overflow int32. In larger groups a sum would not be exact in float32.
MAX_INPUTS = 1 << 17
MAX_GROUP_SIZE = 1 << 13
SIGN_BIT = -128
SYMMETRIC_ZERO = 8
NIBBLES = 16

NUMBER_KINDS = {torch.float32: 0, torch.float16: 1}
ZERO_MIDDLE, ZERO_NIBBLE, ZERO_FLOAT32, ZERO_MINIMUM = 0, 1, 2, 3


class _NumbersStructure(ctypes.Structure):
    """The structure `GroupNumbers` of interface.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("shift", ctypes.c_int32),
    )


class _Structure(ctypes.Structure):
    """The structure `Weight` of interface.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scales", _NumbersStructure),
        ("minimums", _NumbersStructure),
        ("scale_unit", ctypes.c_float),
        ("zero_kind", ctypes.c_int32),
        ("scaled_in_groups", ctypes.c_int32),
    )


@dataclass(frozen=True)
class PackedNumbers:
    """`GroupNumbers` in blocks of outputs: values [N / 16, S, 16], factors int8 [N / 16, G, 16] or None."""

    values: Tensor
    factors: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.factors is None else self.factors.nbytes)

    def structure(self) -> _NumbersStructure:
        shared = 1 if self.factors is None else self.factors.shape[1] // self.values.shape[1]
        factors = None if self.factors is None else self.factors.data_ptr()
        kind = NUMBER_KINDS[self.values.dtype]
        return _NumbersStructure(self.values.data_ptr(), factors, kind, shared.bit_length() - 1)


class PackedWeight:
    """A packed weight and its description for the library.

    values: int32 [N / 16, units, 16]; scales: float32 [N] for outputs, or numbers for groups; zeros: uint8
    [N / 16, groups, 8] (two 4-bit zero points per byte), float32 [N / 16, groups, 16], numbers if they are minimums, or
    None if all zero points are the middle of the range. The groups have ``group_size`` inputs; if there is one scale
    for an output, they are groups of the activations, and 0 stands for none. Every scale is multiplied by
    ``scale_unit``, a power of two. The tensors must not be resized or moved.
    """

    def __init__(
        self,
        values: Tensor,
        inputs: int,
        scales: Tensor | PackedNumbers | None = None,
        zeros: Tensor | PackedNumbers | None = None,
        group_size: int = 0,
        scale_unit: float = 1.0,
    ) -> None:
        self.values, self.scales, self.zeros = values, scales, zeros
        self.outputs, self.inputs = values.shape[0] * BLOCK_OUTPUTS, inputs
        self.group_size, self.scale_unit = group_size, scale_unit
        in_groups = isinstance(scales, PackedNumbers)
        self._require_sizes(self.outputs * (inputs // group_size if in_groups else 1))
        zero_kind, zero_address = ZERO_MIDDLE, None
        if isinstance(zeros, Tensor):
            zero_kind, zero_address = ZERO_NIBBLE if zeros.dtype == torch.uint8 else ZERO_FLOAT32, zeros.data_ptr()
        elif zeros is not None:
            zero_kind = ZERO_MINIMUM
        per_output = PackedNumbers(scales) if isinstance(scales, Tensor) else scales
        self._structure = _Structure(
            self.outputs,
            inputs,
            group_size,
            values.data_ptr(),
            zero_address,
            _NumbersStructure() if per_output is None else per_output.structure(),
            zeros.structure() if isinstance(zeros, PackedNumbers) else _NumbersStructure(),
            scale_unit,
            zero_kind,
            in_groups,
        )
        self.address = ctypes.addressof(self._structure)

    def _require_sizes(self, groups: int) -> None:
        """Raise ValueError if a tensor of scales or zero points has gaps or another size than ``groups`` implies."""
        expected: list[tuple[Tensor, int]] = []
        for part in (self.scales, self.zeros):
            if isinstance(part, Tensor):
                expected.append((part, groups // 2 if part.dtype == torch.uint8 else groups))
            elif part is not None and part.factors is None:
                expected.append((part.values, groups))
            elif part is not None and part.factors is not None:
                shared = max(1, part.factors.shape[1] // part.values.shape[1])
                expected += [(part.factors, groups), (part.values, groups // shared)]
        for tensor, size in expected:
            if tensor.numel() != size or not tensor.is_contiguous():
                raise ValueError(f"expected {size} scales and zero points without gaps, got {list(tensor.shape)}")

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None)

    def of_rows(self, rows: Tensor) -> PackedWeight:
        """Return the weight of the outputs ``rows``, int64 [R], repeated until their number is a multiple of 16."""
        padded = F.pad(rows, (0, -len(rows) % BLOCK_OUTPUTS))
        blocks, lanes = padded // BLOCK_OUTPUTS, padded % BLOCK_OUTPUTS

        def select(part: Tensor) -> Tensor:
            if part.dim() == 1:
                return part[padded]
            chosen = part[blocks, :, lanes]  # [R, units]
            return chosen.view(-1, BLOCK_OUTPUTS, chosen.shape[1]).transpose(1, 2).contiguous()

        def selected(part: Tensor | PackedNumbers | None) -> Tensor | PackedNumbers | None:
            if isinstance(part, PackedNumbers):
                return PackedNumbers(select(part.values), None if part.factors is None else select(part.factors))
            if isinstance(part, Tensor) and part.dtype == torch.uint8:
                return _nibble_blocks(select(_zeros_of_nibbles(part)))
            return None if part is None else select(part)

        return PackedWeight(
            select(self.values),
            self.inputs,
            selected(self.scales),
            selected(self.zeros),
            self.group_size,
            self.scale_unit,
        )


def packable(outputs: int, inputs: int, group_size: int = GROUP_MULTIPLE) -> bool:
    """Return whether the kernels take a weight of this shape."""
    return (
        outputs % BLOCK_OUTPUTS == 0
        and inputs % INPUTS_MULTIPLE == 0
        and 0 < inputs <= MAX_INPUTS
        and group_size % GROUP_MULTIPLE == 0
        and group_size <= MAX_GROUP_SIZE
    )


def pack_int8(values: Tensor, scales: Tensor, group_size: int = 0) -> PackedWeight:
    """Pack values, int8 [N, K], with scales, float32 [N].

    group_size: inputs that share a scale of the int8 activations; 0 if all inputs of a token do
    """
    units = _pack_units(values ^ SIGN_BIT)
    return PackedWeight(units, values.shape[1], scales.float().contiguous(), group_size=group_size)


def pack_group_int8(values: Tensor, scales: GroupNumbers, minimums: GroupNumbers | None) -> PackedWeight:
    """Pack values, int8 [N, K], of the weight ``q * scale - minimum``."""
    units, inputs = _pack_units(values ^ SIGN_BIT), values.shape[1]
    return PackedWeight(
        units,
        inputs,
        _pack_numbers(scales),
        None if minimums is None else _pack_numbers(minimums),
        inputs // scales.groups,
    )


def unpack_group_int8(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the packed values, int8 [N, K], with scales and minimums, float32 [N, G]; None for no minimums."""
    assert isinstance(weight.scales, PackedNumbers)
    assert not isinstance(weight.zeros, Tensor)
    minimums = None if weight.zeros is None else _unpack_numbers(weight.zeros)
    return unpack_int8(weight), _unpack_numbers(weight.scales), minimums


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


def pack_int4(
    packed: Tensor, scales: GroupNumbers, zeros: Tensor | GroupNumbers, scale_unit: float = 1.0
) -> PackedWeight:
    """Pack uint8 [N, K / 2] as in `reference.pack_int4`, with scales in multiples of ``scale_unit``.

    zeros: zero points, float32 [N, G], or numbers if they are minimums
    """
    inputs = packed.shape[1] * 2
    octets = unpack_nibbles(packed).view(len(packed), -1, 2, 4)
    values = _pack_units((octets[:, :, 0] | (octets[:, :, 1] << 4)).flatten(1))
    packed_zeros = _pack_zeros(zeros) if isinstance(zeros, Tensor) else _pack_numbers(zeros)
    return PackedWeight(values, inputs, _pack_numbers(scales), packed_zeros, inputs // scales.groups, scale_unit)


def unpack_int4(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return what was packed: uint8 [N, K / 2], and scales and zero points, float32 [N, K / group_size]."""
    assert isinstance(weight.scales, PackedNumbers)
    octets = _unpack_units(weight.values, torch.uint8).view(weight.outputs, -1, 4)
    values = torch.stack([octets & 0xF, octets >> 4], dim=2).flatten(1)
    scales = _unpack_numbers(weight.scales) * weight.scale_unit
    if weight.zeros is None:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    elif isinstance(weight.zeros, PackedNumbers):
        values, scales, zeros = zero_points(values, scales, _unpack_numbers(weight.zeros))
    elif weight.zeros.dtype == torch.uint8:
        zeros = _unpack_groups(_zeros_of_nibbles(weight.zeros)).float()
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


def _pack_numbers(numbers: GroupNumbers) -> PackedNumbers:
    factors = None if numbers.factors is None else _pack_groups(numbers.factors)
    return PackedNumbers(_pack_groups(numbers.values), factors)


def _unpack_numbers(numbers: PackedNumbers) -> Tensor:
    factors = None if numbers.factors is None else _unpack_groups(numbers.factors)
    return GroupNumbers(_unpack_groups(numbers.values), factors).expanded()


def _zeros_of_nibbles(zeros: Tensor) -> Tensor:
    """Return zero points, uint8 [N / 16, groups, 16], of two in a byte."""
    return unpack_nibbles(zeros.flatten(0, 1)).view(*zeros.shape[:2], BLOCK_OUTPUTS)


def _nibble_blocks(zeros: Tensor) -> Tensor:
    return pack_nibbles(zeros.flatten(0, 1)).view(*zeros.shape[:2], BLOCK_OUTPUTS // 2)


def _pack_zeros(zeros: Tensor) -> Tensor | None:
    if bool((zeros == SYMMETRIC_ZERO).all()):
        return None
    blocks = _pack_groups(zeros)
    small_integers = (blocks == blocks.round()) & (blocks >= 0) & (blocks < NIBBLES)
    if not bool(small_integers.all()):
        return blocks
    return _nibble_blocks(blocks.to(torch.uint8))
