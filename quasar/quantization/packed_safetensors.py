"""Reads quantized safetensors in the format of their ``quantization_config``: compressed-tensors, GPTQ or AWQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.config import ModelConfig
from quasar.model.tensor_files import TensorFiles
from quasar.quantization.packed_rows import PackedRows

NIBBLES = 8
"""Number of 4-bit values in an int32."""

# Positions of eight consecutive outputs in an int32 of AWQ (AutoAWQ's GEMM layout).
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class SafetensorsCheckpoint:
    """Implements `PackedCheckpoint` for a folder.

    Raises RequestError if the format is not supported. Supported are compressed-tensors (4 bits in groups, or 8 bits
    per channel) and 4-bit GPTQ and AWQ.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = ModelConfig.read(path)
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self._quantization: dict[str, Any] = raw.get("quantization_config") or {}
        self._tensors = TensorFiles(path)
        method = self._quantization.get("quant_method")
        readers = {"compressed-tensors": self._compressed, "gptq": self._gptq, "awq": self._awq}
        if method not in readers:
            raise RequestError(
                f"{path}/config.json: quantization_config.quant_method is {method!r}; "
                f"supported are {', '.join(readers)}"
            )
        bits = self._quantization.get("bits", 4)
        if method != "compressed-tensors" and bits != 4:
            raise RequestError(f"{path}/config.json: {method} in {bits} bits is not supported; convert it to 4 bits")
        self._read = readers[method]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dense(self, name: str) -> Tensor:
        return self._tensors.read(name).float()

    def packed(self, name: str) -> PackedRows | None:
        layer = name.removesuffix(".weight")
        if name in self and f"{layer}.weight_scale" not in self._tensors:
            return None
        return self._read(layer)

    def _compressed(self, layer: str) -> PackedRows:
        """Read ``weight_packed``, int32 [N, K / 8] with the first value in the low bits, or ``weight``, int8 [N, K]."""
        scales = self._tensors.read(f"{layer}.weight_scale").float()
        scales = scales.view(len(scales), -1)
        if f"{layer}.weight_packed" not in self._tensors:
            values = self._tensors.read(f"{layer}.weight")
            if values.dtype != torch.int8:
                raise RequestError(
                    f"{self.path}: {layer}.weight is {values.dtype}; only int8 and packed 4 bits are supported"
                )
            return PackedRows(8, values, scales, torch.zeros_like(scales), True, quantized_inputs=self._int8_inputs())
        rows, columns = self._tensors.read(f"{layer}.weight_shape").tolist()
        values = unpack(self._tensors.read(f"{layer}.weight_packed"))[:, :columns]
        zeros, symmetric = torch.full_like(scales, 8), True
        if f"{layer}.weight_zero_point" in self._tensors:
            # The zeros are packed along the outputs and, like the values, shifted to 0..15.
            packed = self._tensors.read(f"{layer}.weight_zero_point")
            zeros, symmetric = unpack(packed.T.contiguous()).T[:rows].float(), False
        return PackedRows(4, values, scales, zeros, symmetric)

    def _int8_inputs(self) -> bool:
        groups = self._quantization.get("config_groups", {}).values()
        inputs = [group.get("input_activations") for group in groups]
        return bool(inputs) and all(entry is not None and entry.get("num_bits") == 8 for entry in inputs)

    def _gptq(self, layer: str) -> PackedRows:
        """Read ``qweight``, int32 [K / 8, N] packed along the inputs, and ``qzeros``, int32 [G, N / 8].

        Except in the format gptq_v2, the stored zeros are smaller by 1 than the real ones.
        """
        values = unpack(self._tensors.read(f"{layer}.qweight").T.contiguous())
        scales = self._tensors.read(f"{layer}.scales").float().T.contiguous()
        stored_whole = self._quantization.get("checkpoint_format") == "gptq_v2"
        zeros = unpack(self._tensors.read(f"{layer}.qzeros")).T.float() + (0 if stored_whole else 1)
        columns, groups = values.shape[1], scales.shape[1]
        in_order = torch.arange(columns) // (columns // groups)
        if f"{layer}.g_idx" in self._tensors and not torch.equal(self._tensors.read(f"{layer}.g_idx").long(), in_order):
            raise RequestError(
                f"{self.path}: {layer} was quantized with desc_act, so its groups are not consecutive inputs; "
                "only groups of consecutive inputs are supported"
            )
        return PackedRows(4, values, scales, zeros.contiguous(), bool((zeros == 8).all()))

    def _awq(self, layer: str) -> PackedRows:
        """Read ``qweight``, int32 [K, N / 8], and ``qzeros``, int32 [G, N / 8], packed along the outputs."""

        def in_order(name: Literal["qweight", "qzeros"]) -> Tensor:
            stored = unpack(self._tensors.read(f"{layer}.{name}"))
            return stored.view(len(stored), -1, NIBBLES)[:, :, list(AWQ_ORDER)].flatten(1).T.contiguous()

        zeros = in_order("qzeros").float()
        scales = self._tensors.read(f"{layer}.scales").float().T.contiguous()
        return PackedRows(4, in_order("qweight"), scales, zeros, bool((zeros == 8).all()))


def unpack(packed: Tensor) -> Tensor:
    """Unpack int32 [R, C] to uint8 [R, 8 C]. Value j of an int32 is in its bits 4 j to 4 j + 3."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed.unsqueeze(2) >> shifts) & 0xF).to(torch.uint8).flatten(1)
