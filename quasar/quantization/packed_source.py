"""What the readers of quantized safetensors share: checked access to tensors, and the packing of integers in int32."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.tensor_files import TensorFiles
from quasar.quantization.packed_rows import PackedRows


class Reader(Protocol):
    """Reads one format. entry: its configuration in config.json, at ``place``."""

    def __init__(self, entry: dict[str, Any], place: str, source: QuantizedTensors) -> None: ...

    def quantizes(self, layer: str) -> bool:
        """Whether the layer is stored quantized."""
        ...

    def read(self, layer: str) -> PackedRows:
        """Read a layer that is stored quantized. Raises RequestError if a tensor does not follow from the config."""
        ...


class FormatConfig(BaseModel):
    """Keys of a format. Those that do not change the stored weights are of type Any."""

    model_config = ConfigDict(strict=True, extra="forbid")


class QuantizedTensors:
    """The tensors of the quantized layers, with checks.

    shapes: of the dequantized tensors, by name; read_names: the tensors that have been read
    """

    def __init__(self, tensors: TensorFiles, shapes: dict[str, tuple[int, ...]]) -> None:
        self._tensors = tensors
        self.shapes = shapes
        self.read_names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def place(self, name: str) -> str:
        """Return the file and the name of a tensor, for messages."""
        return f"{self._tensors.file_of(name)}: {name}"

    def take(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Tensor:
        """Read a tensor. Raises RequestError if it is missing or has another dtype or shape."""
        dtype, shape = self._tensors.dtype(name), self._tensors.shape(name)
        if dtype not in dtypes or shape not in shapes:
            expected = " or ".join(str(list(one)) for one in shapes)
            raise RequestError(
                f"{self.place(name)} is {dtype} {list(shape)}, but its format implies {' or '.join(dtypes)} {expected}"
            )
        self.read_names.add(name)
        return self._tensors.read(name)

    def scales(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """Read scales, float32. Raises RequestError like `take`, or if one is not finite."""
        scales = self.take(name, ("F32", "F16", "BF16"), *shapes).float()
        if not scales.isfinite().all():
            raise RequestError(f"{self.place(name)} contains NaN or infinite values; download the checkpoint again")
        return scales


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 [R, C] to uint8 [R, C * 32 / bits]. Value j of an int32 is in its bits ``bits * j`` and on."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(2) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def order_of(group_of_input: Tensor, size: int, name: str) -> Tensor | None:
    """Return the order of inputs, int64 [K], in which groups of ``size`` are consecutive; None if they are already.

    group_of_input: int [K], the group of every input, or all -1 if the groups are consecutive

    For example ``[1, 0, 0, 1]`` gives ``[1, 2, 0, 3]``. Raises RequestError if the groups differ in size.
    """
    found = group_of_input.long()
    if (found == -1).all() or torch.equal(found, torch.arange(len(found)) // size):
        return None
    groups = len(found) // size
    in_range = bool(((found >= 0) & (found < groups)).all())
    if not in_range or not (torch.bincount(found, minlength=groups) == size).all():
        raise RequestError(f"{name} does not assign {size} inputs to each of {groups} groups; it is damaged")
    return torch.argsort(found, stable=True)


def group_size_of(configured: int | None, columns: int, place: str) -> int:
    """Return the number of inputs of a group; None and -1 stand for all inputs.

    Raises RequestError if it does not divide the number of inputs, ``columns``.
    """
    size = columns if configured in (None, -1) else configured
    assert size is not None
    if size < 1 or columns % size:
        raise RequestError(f"{place}: group_size={configured} does not divide its {columns} inputs")
    return size


def require_multiple(rows: int, columns: int, shared: int, place: str) -> None:
    """Raise RequestError if the numbers of rows and columns are not multiples of ``shared``, the values per int32."""
    if rows % shared or columns % shared:
        raise RequestError(f"{place} has shape {[rows, columns]}, and {shared} values share an integer in this format")
