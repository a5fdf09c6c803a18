"""Reads AWQ checkpoints of 4 bits, in the layout that AutoAWQ calls GEMM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from quasar.model.json_files import checked
from quasar.quantization.packed_rows import PackedRows
from quasar.quantization.packed_source import FormatConfig, QuantizedTensors, group_size_of, require_multiple, unpack

# Positions of eight consecutive outputs in an int32.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    """AWQ: ``qweight``, int32 [K, N / 8], and ``qzeros``, int32 [G, N / 8], packed along the outputs."""

    def __init__(self, entry: dict[str, Any], place: str, source: QuantizedTensors) -> None:
        self._place, self._source = place, source
        self._config = checked(_Config, entry, place)

    def quantizes(self, layer: str) -> bool:
        return f"{layer}.qweight" in self._source

    def read(self, layer: str) -> PackedRows:
        source = self._source
        rows, columns = source.shapes[f"{layer}.weight"]
        groups = columns // group_size_of(self._config.group_size, columns, f"{self._place}: {layer}")
        require_multiple(rows, columns, 8, f"{self._place}: {layer}")

        def in_order(name: Literal["qweight", "qzeros"], length: int) -> Tensor:
            stored = unpack(source.take(f"{layer}.{name}", ("I32",), (length, rows // 8)), 4)
            return stored.view(length, -1, 8)[:, :, list(AWQ_ORDER)].flatten(1).T.contiguous()

        zeros = in_order("qzeros", groups).float()
        scales = source.scales(f"{layer}.scales", (groups, rows)).T.contiguous()
        return PackedRows(4, in_order("qweight", columns), scales, zeros, bool((zeros == 8).all()))


class _Config(FormatConfig):
    quant_method: str
    bits: Literal[4] = 4
    group_size: Annotated[int, Field(ge=-1)] = 128
    zero_point: bool | None = True
    version: Literal["gemm", "GEMM"] | None = "gemm"
    format: Literal["gemm"] | None = None
    modules_to_not_convert: Any = None
    backend: Any = None
    do_fuse: Any = None
    modules_to_fuse: Any = None
    fuse_max_seq_len: Any = None
    exllama_config: Any = None
