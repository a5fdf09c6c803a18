"""Reads quantized safetensors in the format of their ``quantization_config``.

Nothing is guessed from a shape: the config says how every tensor is encoded, and a key, tensor, dtype or shape that
does not follow from it is refused by name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.config_file import read_config
from quasar.model.json_files import read_object
from quasar.model.loading import tied_as_stored
from quasar.model.tensor_files import TensorFiles
from quasar.model.tensor_names import source_shapes
from quasar.model.transformer import Transformer
from quasar.quantization.packed_awq import Awq
from quasar.quantization.packed_bitsandbytes import Bitsandbytes
from quasar.quantization.packed_compressed import CompressedTensors
from quasar.quantization.packed_gptq import Gptq
from quasar.quantization.packed_rows import PackedRows
from quasar.quantization.packed_source import QuantizedTensors, Reader

_READERS: dict[str, type[Reader]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": Bitsandbytes,
}


class SafetensorsCheckpoint:
    """Implements `PackedCheckpoint` for a folder.

    Raises RequestError if the format is not supported. Supported are compressed-tensors (integers of 4 or 8 bits, per
    tensor, channel or group, and FP8 per tensor or channel), GPTQ of 4 or 8 bits, 4-bit AWQ, and int8 of bitsandbytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = TensorFiles(path)
        self.config = tied_as_stored(read_config(path), self._tensors)
        with torch.device("meta"):
            self.shapes = source_shapes(Transformer(self.config))
        raw = read_object(path / "config.json")
        spelled = {key: raw[key] for key in ("quantization_config", "compression_config") if raw.get(key)}
        if len(spelled) == 2:
            raise RequestError(
                f"{path}/config.json: has quantization_config and compression_config; delete one of them"
            )
        key, entry = next(iter(spelled.items()), ("quantization_config", {}))
        method = entry.get("quant_method") if isinstance(entry, dict) else None
        if not isinstance(method, str) or method not in _READERS:
            raise RequestError(
                f"{path}/config.json: {key}.quant_method is {method!r}; supported are {', '.join(_READERS)}"
            )
        self._source = QuantizedTensors(self._tensors, self.shapes)
        self._reader: Reader = _READERS[method](entry, f"{path}/config.json: {key}", self._source)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dense(self, name: str) -> Tensor:
        rows = self.packed(name)
        if rows is not None:
            return rows.restored()
        self._source.read_names.add(name)
        return self._tensors.read_float(name).float()

    def packed(self, name: str) -> PackedRows | None:
        return self._reader.read(name.removesuffix(".weight")) if self.quantizes(name) else None

    def quantizes(self, name: str) -> bool:
        """Whether the weight of this name is stored quantized."""
        return len(self.shapes[name]) == 2 and self._reader.quantizes(name.removesuffix(".weight"))

    def require_all_read(self) -> None:
        """Raise RequestError if the files contain tensors that have not been read."""
        tied = ["lm_head.weight"] if self.config.tie_word_embeddings else []
        self._tensors.require_only([*self._source.read_names, *tied], "config.json does not imply")
