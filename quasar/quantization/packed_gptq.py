"""Reads GPTQ checkpoints of 4 or 8 bits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from quasar.errors import RequestError
from quasar.model.json_files import checked
from quasar.quantization.packed_rows import PackedRows
from quasar.quantization.packed_source import (
    FormatConfig,
    QuantizedTensors,
    group_size_of,
    order_of,
    require_multiple,
    unpack,
)


class Gptq:
    """GPTQ: ``qweight``, int32 [K / 8, N] packed along the inputs, and ``qzeros``, int32 [G, N / 8].

    Except in the format gptq_v2, the stored zeros are smaller by 1 than the real ones.
    """

    def __init__(self, entry: dict[str, Any], place: str, source: QuantizedTensors) -> None:
        self._place, self._source = place, source
        self._config = checked(_Config, entry, place)
        formats = {self._config.checkpoint_format, self._config.format} - {None}
        if len(formats) > 1:
            raise RequestError(f"{place}: checkpoint_format and format disagree; delete the wrong one")
        self._stored_whole = formats == {"gptq_v2"}

    def quantizes(self, layer: str) -> bool:
        return f"{layer}.qweight" in self._source

    def read(self, layer: str) -> PackedRows:
        source = self._source
        rows, columns = source.shapes[f"{layer}.weight"]
        size = group_size_of(self._config.group_size, columns, f"{self._place}: {layer}")
        groups = columns // size
        bits, middle = self._config.bits, 1 << (self._config.bits - 1)
        shared = 32 // bits
        require_multiple(rows, columns, shared, f"{self._place}: {layer}")
        values = unpack(source.take(f"{layer}.qweight", ("I32",), (columns // shared, rows)).T.contiguous(), bits)
        scales = source.scales(f"{layer}.scales", (groups, rows)).T.contiguous()
        stored = unpack(source.take(f"{layer}.qzeros", ("I32",), (groups, rows // shared)), bits).T.float().contiguous()
        if not self._stored_whole and (stored == 2 * middle - 1).any():
            raise RequestError(
                f"{source.place(f'{layer}.qzeros')} contains {2 * middle - 1}, which stands for a zero point of 0 or "
                f"of {2 * middle}, as the program that reads it likes; convert the checkpoint to "
                "checkpoint_format=gptq_v2"
            )
        zeros = stored + (0 if self._stored_whole else 1)
        order = None
        if f"{layer}.g_idx" in source:
            order = order_of(source.take(f"{layer}.g_idx", ("I32", "I64"), (columns,)), size, f"{layer}.g_idx")
        elif self._config.desc_act:
            raise RequestError(f"{self._place}.desc_act is true, but {layer}.g_idx is missing")
        if order is not None:
            values = values[:, order].contiguous()
        symmetric = bool((zeros == middle).all())
        if bits == 4:
            return PackedRows(4, values, scales, zeros, symmetric, order=order)
        signed = (values.short() - middle).to(torch.int8)
        return PackedRows(8, signed, scales, zeros - middle, symmetric, order=order)


class _Config(FormatConfig):
    quant_method: str
    bits: Literal[4, 8] = 4
    group_size: Annotated[int, Field(ge=-1)] = 128
    desc_act: bool | None = False
    sym: bool | None = True
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    format: Literal["gptq", "gptq_v2"] | None = None
    pack_dtype: Literal["int32"] | None = None
    is_marlin_format: Literal[False] | None = None
    lm_head: bool | None = None
    dynamic: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    rotation: Literal[False] | None = None
    adapter: None = None
    static_groups: Any = None
    true_sequential: Any = None
    damp_percent: Any = None
    damp_auto_increment: Any = None
    mse: Any = None
    model_name_or_path: Any = None
    model_file_base_name: Any = None
    meta: Any = None
    model_seqlen: Any = None
    dataset: Any = None
    tokenizer: Any = None
    batch_size: Any = None
    pad_token_id: Any = None
    block_name_to_quantize: Any = None
    module_name_preceding_first_block: Any = None
    modules_in_block_to_quantize: Any = None
    cache_block_outputs: Any = None
    max_input_length: Any = None
    use_cuda_fp16: Any = None
    use_exllama: Any = None
    disable_exllama: Any = None
    exllama_config: Any = None
    backend: Any = None
