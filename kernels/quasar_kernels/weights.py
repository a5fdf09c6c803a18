"""Weight matrices, the operands of the matmuls.

A weight is given in its canonical form, which `quasar_kernels.reference` takes, and stores one copy of its values. If
the CPU kernels take it, it is packed at once as ``packed_for_cpu``, which is None otherwise; its canonical form is then
computed from the packed one at every access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quasar_kernels import cpu, reference
from quasar_kernels.cpu import PackedWeight
from quasar_kernels.cpu.packing import (
    GROUP_MULTIPLE,
    SYMMETRIC_ZERO,
    float16_scale_unit,
    packable,
    unpack_dense,
    unpack_dense_rows,
    unpack_group_int8,
    unpack_int4,
    unpack_int8,
)
from quasar_kernels.group_numbers import GroupNumbers

if TYPE_CHECKING:
    from quasar_kernels.triton.int4_packing import PackedInt4
    from quasar_kernels.triton.linear_w8_groups import PackedGroupInt8

# Group sizes of PyTorch's packed 4-bit matmul.
TORCH_INT4_GROUP_SIZES = (32, 64, 128, 256)
TORCH_INT4_OUTPUTS_MULTIPLE = 16


class Quantized(NamedTuple):
    """Activations as `reference.quantize_tokens` gives them: values int8 [M, K], scales float32 [M, G], one group per
    token or those of the weight; dtype: of the result of a matmul with them."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


class InputOrder:
    """The input that each column of a weight is multiplied with: indices int64 [K], a permutation."""

    def __init__(self, indices: Tensor) -> None:
        expected = torch.arange(len(indices), device=indices.device)
        if indices.dtype != torch.int64 or not torch.equal(indices.sort().values, expected):
            raise ValueError(f"expected a permutation, int64 [K], got {indices.dtype} {list(indices.shape)}")
        self.indices = indices.contiguous()

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes


class Int8Weight:
    """An int8 weight with one scale per output channel: values int8 [N, K], scales float32 [N].

    group_size: the number of inputs that share a scale if activations are quantized to int8; 0 if all inputs of a token
        share one
    """

    def __init__(self, values: Tensor, scales: Tensor, group_size: int = 0) -> None:
        if values.dim() != 2 or values.dtype != torch.int8 or scales.shape != (len(values),):
            raise ValueError(
                f"expected int8 values [N, K] with scales [N], got {values.dtype} {list(values.shape)} with scales "
                f"{list(scales.shape)}"
            )
        if group_size < 0 or (group_size and values.shape[1] % group_size):
            raise ValueError(f"group_size: expected 0 or a divisor of {values.shape[1]}, got {group_size}")
        self.outputs, self.inputs = values.shape
        self.scales, self.group_size = scales, 0 if group_size == self.inputs else group_size
        takes = _has_kernels(values.device, self.outputs, self.inputs, self.group_size or GROUP_MULTIPLE)
        self.packed_for_cpu = cpu.pack_int8(values, scales, self.group_size) if takes else None
        self._values = values if self.packed_for_cpu is None else None

    @staticmethod
    def rounded(values: Tensor) -> Int8Weight:
        """Round a float matrix [N, K] to nearest and pack it."""
        scales = values.float().abs().amax(1) / reference.INT8_MAX
        return Int8Weight(torch.round(values.float() / scales.unsqueeze(1)).to(torch.int8), scales)

    @property
    def values(self) -> Tensor:
        """int8 [N, K]."""
        if self._values is not None:
            return self._values
        assert self.packed_for_cpu is not None
        return unpack_int8(self.packed_for_cpu)

    @property
    def nbytes(self) -> int:
        """Bytes that a matmul reads."""
        return self.outputs * self.inputs + self.scales.nbytes

    def rows(self, indices: Tensor) -> Tensor:
        """Return dequantized rows, float32 [R, K]. indices: int64 [R]."""
        if self._values is not None:
            values = self._values[indices]
        else:
            assert self.packed_for_cpu is not None
            values = unpack_int8(self.packed_for_cpu.of_rows(indices))[: len(indices)]
        return values.float() * self.scales[indices].unsqueeze(1)


class Fp8Weight:
    """An FP8 weight with one scale per output channel: values float8_e4m3fn [N, K], scales float32 [N].

    The CPU kernels have no FP8. For them the values are packed as bfloat16, which holds every E4M3 number exactly and
    takes twice the memory.
    """

    group_size = 0

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        if values.dim() != 2 or values.dtype != torch.float8_e4m3fn or scales.shape != (len(values),):
            raise ValueError(
                f"expected float8_e4m3fn values [N, K] with scales [N], got {values.dtype} {list(values.shape)} with "
                f"scales {list(scales.shape)}"
            )
        self.outputs, self.inputs = values.shape
        self.scales = scales
        takes = _has_kernels(values.device, self.outputs, self.inputs)
        self.packed_for_cpu = cpu.pack_dense(values.to(torch.bfloat16)) if takes else None
        self._values = values if self.packed_for_cpu is None else None

    @staticmethod
    def rounded(values: Tensor) -> Fp8Weight:
        """Round a float matrix [N, K] to nearest and pack it. A channel of zeros gets scale 1."""
        rounded, scales = reference.quantize_tokens_fp8(values)
        return Fp8Weight(rounded, scales.squeeze(1))

    @property
    def values(self) -> Tensor:
        """float8_e4m3fn [N, K]."""
        if self._values is not None:
            return self._values
        assert self.packed_for_cpu is not None
        return unpack_dense(self.packed_for_cpu, torch.bfloat16).to(torch.float8_e4m3fn)

    @property
    def nbytes(self) -> int:
        """Bytes of the format, which a matmul reads where there are instructions for FP8."""
        return self.outputs * self.inputs + self.scales.nbytes


class GroupInt8Weight:
    """An int8 weight ``q * scale - minimum`` in groups along K, with scales and minimums as they are stored.

    values: int8 [N, K]; minimums: None if all are 0. The CPU kernels take groups of a multiple of 16 inputs.
    """

    def __init__(self, values: Tensor, scales: GroupNumbers, minimums: GroupNumbers | None = None) -> None:
        groups = scales.groups
        valid = values.dim() == 2 and values.dtype == torch.int8 and len(scales.values) == len(values)
        valid = valid and (minimums is None or (minimums.groups, len(minimums.values)) == (groups, len(values)))
        if not valid or values.shape[1] % groups:
            raise ValueError(
                f"expected int8 values [N, K] with scales and minimums [N, G], got {values.dtype} {list(values.shape)} "
                f"with {groups} groups"
            )
        self.outputs, self.inputs = values.shape
        self.group_size = self.inputs // groups
        self.packed_for_cpu: PackedWeight | None = None
        self._canonical: tuple[Tensor, GroupNumbers, GroupNumbers | None] | None = (values, scales, minimums)
        if _has_kernels(values.device, self.outputs, self.inputs, self.group_size):
            self.packed_for_cpu = cpu.pack_group_int8(values, scales, minimums)
            self._canonical = None
        self._triton: PackedGroupInt8 | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a matmul reads."""
        if self.packed_for_cpu is not None:
            return self.packed_for_cpu.nbytes
        assert self._canonical is not None
        return sum(part.nbytes for part in self._canonical if part is not None)

    def canonical(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values, int8 [N, K], and scales and minimums, float32 [N, G]."""
        if self._canonical is not None:
            values, scales, minimums = self._canonical
            return values, scales.expanded(), None if minimums is None else minimums.expanded()
        assert self.packed_for_cpu is not None
        return unpack_group_int8(self.packed_for_cpu)

    def dequantize(self) -> Tensor:
        """Return the matrix, float32 [N, K]."""
        return reference.dequantize_groups(*self.canonical())

    def rows(self, indices: Tensor) -> Tensor:
        """Return dequantized rows, float32 [R, K]. indices: int64 [R]."""
        if self.packed_for_cpu is not None:
            chosen = unpack_group_int8(self.packed_for_cpu.of_rows(indices))
            return reference.dequantize_groups(*chosen)[: len(indices)]
        values, scales, minimums = self.canonical()
        return reference.dequantize_groups(
            values[indices], scales[indices], None if minimums is None else minimums[indices]
        )

    def packed_for_triton(self) -> PackedGroupInt8:
        """Return the form for the Triton kernels, which has the same values."""
        if self._triton is None:
            from quasar_kernels.triton.linear_w8_groups import PackedGroupInt8, TransposedNumbers

            assert self._canonical is not None
            values, scales, minimums = self._canonical
            lowest = None if minimums is None else TransposedNumbers.of(minimums)
            self._triton = PackedGroupInt8(values, TransposedNumbers.of(scales), lowest, self.group_size)
        return self._triton


class Int4Weight:
    """A 4-bit weight ``(q - zero) * scale``, or ``q * scale - minimum``, in groups along K.

    packed: uint8 [N, K / 2] as in `reference.pack_int4`
    scales: float [N, K / group_size]. For activations of float32, the exactness mode, they stay float32; for 16-bit
        activations they are rounded to float16 times a power of two per matrix, and ``scales`` gives the rounded ones,
        so that every backend computes the same. `GroupNumbers` are kept as they are
    zeros: zero points, float [N, K / group_size], or the minimums as `GroupNumbers`
    """

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor | GroupNumbers,
        zeros: Tensor | GroupNumbers,
        symmetric: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        shape, zeros_shape = (
            part.shape if isinstance(part, Tensor) else torch.Size((len(part.values), part.groups))
            for part in (scales, zeros)
        )
        valid = packed.dim() == 2 and packed.dtype == torch.uint8 and zeros_shape == shape and len(shape) == 2
        if not valid or shape[0] != len(packed) or shape[1] == 0 or packed.shape[1] * 2 % shape[1]:
            raise ValueError(
                f"expected uint8 [N, K / 2] with scales and zeros [N, G], got {packed.dtype} {list(packed.shape)} with "
                f"scales {list(shape)} and zeros {list(zeros_shape)}"
            )
        self.outputs, self.inputs = len(packed), packed.shape[1] * 2
        self.group_size = self.inputs // shape[1]
        self.symmetric, self.dtype = symmetric, dtype
        self._device = packed.device
        stored, unit = (scales, 1.0) if isinstance(scales, GroupNumbers) else _stored_scales(scales, dtype)
        self.packed_for_cpu: PackedWeight | None = None
        self._canonical: tuple[Tensor, Tensor, Tensor] | None = None
        if _has_kernels(self._device, self.outputs, self.inputs, self.group_size):
            self.packed_for_cpu = cpu.pack_int4(
                packed, stored, zeros if isinstance(zeros, GroupNumbers) else zeros.float(), unit
            )
        else:
            self._canonical = _with_zero_points(packed, stored.expanded() * unit, zeros)
        self._nbytes = packed.nbytes + stored.nbytes + self._zero_bytes(zeros)
        self._triton: tuple[PackedInt4, Tensor, Tensor] | None = None
        self._torch_packed: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def rounded(values: Tensor, group_size: int) -> Int4Weight:
        """Round a 16-bit matrix [N, K] to nearest on a symmetric grid in groups, and pack it."""
        groups = values.float().view(len(values), -1, group_size)
        scales = groups.abs().amax(2) / 7
        quants = (torch.round(groups / scales.unsqueeze(2)) + SYMMETRIC_ZERO).to(torch.uint8).view(values.shape)
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
        return Int4Weight(reference.pack_int4(quants), scales, zeros, symmetric=True, dtype=values.dtype)

    def _zero_bytes(self, zeros: Tensor | GroupNumbers) -> int:
        """Bytes of zero points, which have 4 bits, or of minimums."""
        if isinstance(zeros, GroupNumbers):
            return zeros.nbytes
        return 0 if self.symmetric else zeros.numel() // 2

    @property
    def packed(self) -> Tensor:
        """uint8 [N, K / 2] as in `reference.pack_int4`."""
        return self.canonical()[0]

    @property
    def scales(self) -> Tensor:
        """float32 [N, K / group_size]."""
        return self.canonical()[1]

    @property
    def zeros(self) -> Tensor:
        """float32 [N, K / group_size]."""
        return self.canonical()[2]

    @property
    def nbytes(self) -> int:
        """Bytes that a matmul reads: 4-bit integers and zero points, scales of 16 bit (32 in float32 mode)."""
        form = self.packed_for_cpu if self._triton is None else self._triton[0]
        return self._nbytes if form is None else form.nbytes

    def canonical(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return packed, scales and zeros in the form that `quasar_kernels.reference` takes."""
        if self._canonical is not None:
            return self._canonical
        if self._triton is not None:
            values, scales, zeros = self._triton
            return values.canonical(), scales, zeros
        assert self.packed_for_cpu is not None
        return unpack_int4(self.packed_for_cpu)

    def dequantize(self) -> Tensor:
        """Return the matrix, float32 [N, K]."""
        return reference.dequantize_int4(*self.canonical())

    def rows(self, indices: Tensor) -> Tensor:
        """Return dequantized rows, float32 [R, K]. indices: int64 [R]."""
        if self.packed_for_cpu is not None:
            return reference.dequantize_int4(*unpack_int4(self.packed_for_cpu.of_rows(indices)))[: len(indices)]
        return reference.dequantize_int4(*(part[indices] for part in self.canonical()))

    def packed_for_triton(self) -> PackedInt4:
        """Return the form for the Triton kernels. After its first use it is the only copy of the 4-bit integers."""
        if self._triton is None:
            from quasar_kernels.triton.int4_packing import pack_int4

            packed, scales, zeros = self.canonical()
            self._triton = pack_int4(packed, scales, zeros), scales, zeros
            self._canonical = None
        return self._triton[0]

    def packed_for_torch(self) -> tuple[Tensor, Tensor] | None:
        """Return the form for PyTorch's bfloat16 4-bit matmul on a CPU, or None if it does not apply."""
        if self._torch_packed is not None:
            return self._torch_packed
        if (
            self._device.type != "cpu"
            or self.group_size not in TORCH_INT4_GROUP_SIZES
            or self.outputs % TORCH_INT4_OUTPUTS_MULTIPLE
        ):
            return None
        packed, scales, zeros = self.canonical()
        values = reference.unpack_int4(packed).to(torch.int32)
        # PyTorch computes (q - 8) * scale + zero.
        scales_and_offsets = torch.stack([scales, (8 - zeros) * scales], dim=-1).transpose(0, 1).contiguous()
        prepared = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        self._torch_packed = prepared, scales_and_offsets.to(torch.bfloat16)
        return self._torch_packed


def _stored_scales(scales: Tensor, dtype: torch.dtype) -> tuple[GroupNumbers, float]:
    """Return scales in their storage format for activations of ``dtype``, and the number that multiplies them."""
    if dtype == torch.float32:
        return GroupNumbers(scales.float()), 1.0
    unit = float16_scale_unit(scales)
    return GroupNumbers((scales / unit).half()), unit


def _with_zero_points(packed: Tensor, scales: Tensor, zeros: Tensor | GroupNumbers) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(zeros, Tensor):
        return packed, scales, zeros
    values, scales, points = reference.zero_points(reference.unpack_int4(packed), scales, zeros.expanded())
    return reference.pack_int4(values), scales, points


class DenseWeight:
    """An unquantized weight: values bfloat16 or float32 [N, K]."""

    group_size = 0

    def __init__(self, values: Tensor) -> None:
        self.outputs, self.inputs = values.shape
        self.dtype = values.dtype
        takes = values.dtype in (torch.bfloat16, torch.float32) and self.has_kernels(values)
        self.packed_for_cpu = cpu.pack_dense(values.detach()) if takes else None
        self._values = values if self.packed_for_cpu is None else None

    @staticmethod
    def has_kernels(values: Tensor) -> bool:
        """Return whether a matrix of this shape and device can be packed."""
        return _has_kernels(values.device, *values.shape)

    @property
    def values(self) -> Tensor:
        """[N, K]."""
        if self._values is not None:
            return self._values
        assert self.packed_for_cpu is not None
        return unpack_dense(self.packed_for_cpu, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that a matmul reads."""
        return self.outputs * self.inputs * self.dtype.itemsize

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows, [len(indices), K], for an embedding that is tied to the output layer. indices: int64 [R]."""
        if self._values is not None:
            return self._values[indices]
        assert self.packed_for_cpu is not None
        return unpack_dense_rows(self.packed_for_cpu, indices, self.dtype)


def _has_kernels(device: torch.device, outputs: int, inputs: int, group_size: int = GROUP_MULTIPLE) -> bool:
    return device.type == "cpu" and packable(outputs, inputs, group_size) and cpu.backend() is not None
