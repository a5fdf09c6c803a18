"""Reads int8 checkpoints of bitsandbytes, and says what to do with those of 4 bits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from quasar.errors import RequestError
from quasar.model.json_files import checked
from quasar.quantization.packed_rows import PackedRows
from quasar.quantization.packed_source import FormatConfig, QuantizedTensors


class Bitsandbytes:
    """LLM.int8() of bitsandbytes: ``weight``, int8 [N, K], and ``SCB``, float32 [N], 127 times the scale of every row.

    Its outliers are of activations, so that the stored weights are int8 without exception.
    """

    def __init__(self, entry: dict[str, Any], place: str, source: QuantizedTensors) -> None:
        self._source = source
        config = checked(_Config, entry, place)
        if config.load_in_8bit and not config.load_in_4bit:
            return
        kind = str(config.bnb_4bit_quant_type or "fp4")
        raise RequestError(
            f"{place}: the weights are {kind.upper()} of bitsandbytes, whose values lie on no regular grid and have no "
            f"kernel here. Measure the same format with verifier=bnb_{kind} and the unquantized model; or write the "
            "dequantized weights with transformers, AutoModelForCausalLM.from_pretrained(FOLDER).dequantize()"
            ".save_pretrained(NEW, save_original_format=False), and pass model.path=NEW"
        )

    def quantizes(self, layer: str) -> bool:
        return f"{layer}.SCB" in self._source

    def read(self, layer: str) -> PackedRows:
        source = self._source
        rows, columns = source.shapes[f"{layer}.weight"]
        layout = f"{layer}.weight_format"
        if layout in source and source.take(layout, ("U8",), ()).item() != 0:
            raise RequestError(f"{source.place(layout)} is not 0 (rows); save the checkpoint with a newer bitsandbytes")
        values = source.take(f"{layer}.weight", ("I8",), (rows, columns))
        scales = source.scales(f"{layer}.SCB", (rows,)).unsqueeze(1) / 127
        return PackedRows(8, values, scales, torch.zeros_like(scales), True)


class _Config(FormatConfig):
    quant_method: str
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_has_fp16_weight: Literal[False] = False
    llm_int8_threshold: Any = None
    llm_int8_skip_modules: Any = None
    llm_int8_enable_fp32_cpu_offload: Any = None
    bnb_4bit_quant_type: Any = None
    bnb_4bit_quant_storage: Any = None
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_use_double_quant: Any = None
    own_load_in_8bit: Any = Field(None, alias="_load_in_8bit")
    own_load_in_4bit: Any = Field(None, alias="_load_in_4bit")
