"""Reads quantized GGUF files. The formats Q8_0, Q4_0 and Q4_1 of ggml have groups of 32 inputs, called blocks there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.gguf_file import GGUFFile
from quasar.quantization.packed_rows import PackedRows

BLOCK = 32
KEPT_PACKED = ("Q8_0", "Q4_0", "Q4_1")
# Types that are stored as floats.
_FLOATS = ("F32", "F16", "BF16")


class GGUFCheckpoint:
    """Implements `PackedCheckpoint` for one GGUF file.

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

    def packed(self, name: str) -> PackedRows | None:
        tensor = self._file.tensor(name)
        kind = tensor.tensor_type.name
        if kind in _FLOATS:
            return None
        if kind not in KEPT_PACKED:
            raise RequestError(
                f"{self.path}: tensor {tensor.name} is {kind}; only {', '.join(KEPT_PACKED)} can stay quantized. "
                f"Pass model=path model.path={self.path} to dequantize the file"
            )
        rows = int(tensor.shape[1])
        blocks = torch.from_numpy(np.array(tensor.data, dtype=np.uint8)).view(rows, int(tensor.shape[0]) // BLOCK, -1)
        found = _int8(blocks) if kind == "Q8_0" else _int4(blocks, offset=kind == "Q4_1")
        values, scales, zeros = (self._file.in_order(name, part) for part in (found.values, found.scales, found.zeros))
        return PackedRows(found.bits, values, scales, zeros, found.symmetric)

    def require_all_read(self) -> None:
        """Do nothing: `GGUFFile` has compared the tensors with the metadata."""


def _int8(blocks: Tensor) -> PackedRows:
    """Read Q8_0. blocks: uint8 [N, K / 32, 34], each with a float16 scale and 32 int8 values."""
    scales = _halves(blocks, 0)
    values = blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1)
    return PackedRows(8, values, scales, torch.zeros_like(scales), symmetric=True)


def _int4(blocks: Tensor, offset: bool) -> PackedRows:
    """Read Q4_0, or Q4_1 with ``offset``.

    blocks: uint8 [N, K / 32, 18 or 20], each with a float16 scale, a float16 minimum if ``offset``, and 16 bytes.
        Byte j contains element j in its low half and element j + 16 in its high half
    """
    scales = _halves(blocks, 0)
    data = blocks[:, :, 4 if offset else 2 :]
    values = torch.cat([data & 0xF, data >> 4], dim=2).flatten(1)
    if not offset:
        return PackedRows(4, values, scales, torch.full_like(scales, 8), symmetric=True)
    minimum = _halves(blocks, 1)
    # ``q * scale + minimum`` equals ``(q - zero) * scale`` with ``zero = -minimum / scale``. A constant group has scale
    # 0, so another scale is chosen for it.
    constant = scales == 0
    scales = torch.where(constant, minimum.abs().clamp(min=1e-12), scales)
    values = values.view(*scales.shape, BLOCK).masked_fill(constant.unsqueeze(2), 0).flatten(1)
    return PackedRows(4, values, scales, -minimum / scales, symmetric=False)


def _halves(blocks: Tensor, index: int) -> Tensor:
    """Return the float16 number with this index in every block, as float32 [N, K / 32]."""
    return blocks[:, :, 2 * index : 2 * index + 2].contiguous().view(torch.float16).squeeze(2).float()
