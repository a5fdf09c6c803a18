"""Reads compressed-tensors: integers of 4 or 8 bits per tensor, channel or group, and FP8 per tensor or channel."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.json_files import checked
from quasar.quantization.packed_rows import PackedRows
from quasar.quantization.packed_source import FormatConfig, QuantizedTensors, group_size_of, order_of, unpack


class CompressedTensors:
    """compressed-tensors, whose config assigns a scheme to every layer by its name or class.

    ``weight_packed`` is int32 [N, K * bits / 32] with the first value in the low bits and 2^(bits - 1) added;
    ``weight`` is int8 or float8_e4m3fn [N, K]. Zero points of ``weight_packed`` are packed in that way, but along the
    outputs.
    """

    def __init__(self, entry: dict[str, Any], place: str, source: QuantizedTensors) -> None:
        for key in ("transform_config", "sparsity_config"):
            value = entry.get(key)
            if value and not (key == "sparsity_config" and value == {"format": "dense"}):
                raise RequestError(
                    f"{place}.{key} changes what the model computes and is not supported; use a checkpoint without it"
                )
        self._place, self._source = place, source
        self._config = checked(_Config, entry, place)
        self._ignore = [_pattern(target, place) for target in self._config.ignore or []]
        self._schemes: dict[str, tuple[re.Pattern[str] | str, _Scheme]] = {}
        for group, scheme in self._config.config_groups.items():
            self._require_supported(scheme, f"{place}.config_groups.{group}")
            for target in scheme.targets:
                if target in self._schemes:
                    raise RequestError(f"{place}.config_groups: two groups have the target {target!r}")
                self._schemes[target] = _pattern(target, place), scheme

    def quantizes(self, layer: str) -> bool:
        return self._scheme(layer) is not None

    def read(self, layer: str) -> PackedRows:
        scheme = self._scheme(layer)
        assert scheme is not None
        weights, source = scheme.weights, self._source
        rows, columns = source.shapes[f"{layer}.weight"]
        if weights.type == "float":
            return self._read_fp8(layer, scheme)
        size = group_size_of(
            weights.group_size if weights.strategy == "group" else -1, columns, f"{self._place}: {layer}"
        )
        groups = columns // size
        offset = 1 << (weights.num_bits - 1)
        packed = (scheme.format or self._config.format) == "pack-quantized"
        values = self._packed_values(layer, weights) if packed else self._bytes(layer, weights)
        if weights.strategy == "group":
            scales = source.scales(f"{layer}.weight_scale", (rows, groups))
        else:
            scales = self._scales_of_rows(layer, weights, rows)
        zeros = self._zeros(layer, weights, packed, (rows, groups)) + offset
        order = None
        if f"{layer}.weight_g_idx" in source:
            order = order_of(
                source.take(f"{layer}.weight_g_idx", ("I32", "I64"), (columns,)), size, f"{layer}.weight_g_idx"
            )
        if order is not None:
            values = values[:, order]
        symmetric = bool((zeros == offset).all())
        inputs = scheme.input_activations
        if weights.num_bits == 4:
            unsigned = values.to(torch.uint8).contiguous()
            return PackedRows(4, unsigned, scales, zeros, symmetric, inputs is not None, order)
        signed = (values.short() - offset).to(torch.int8).contiguous()
        input_group = 0
        if inputs is not None and inputs.strategy == "group":
            input_group = group_size_of(inputs.group_size, columns, f"{self._place}: inputs of {layer}")
        return PackedRows(8, signed, scales, zeros - offset, symmetric, inputs is not None, order, input_group)

    def _packed_values(self, layer: str, weights: _Quantized) -> Tensor:
        """Read unsigned integers [N, K] that are packed in int32."""
        rows, columns = self._source.shapes[f"{layer}.weight"]
        shape = self._source.take(f"{layer}.weight_shape", ("I64", "I32"), (2,)).tolist()
        if shape != [rows, columns]:
            raise RequestError(f"{self._source.place(f'{layer}.weight_shape')} is {shape}, not {[rows, columns]}")
        words = -(-columns * weights.num_bits // 32)
        stored = self._source.take(f"{layer}.weight_packed", ("I32",), (rows, words))
        return unpack(stored, weights.num_bits)[:, :columns]

    def _bytes(self, layer: str, weights: _Quantized) -> Tensor:
        """Read signed integers [N, K] of a byte each, and return them as unsigned ones of ``num_bits``."""
        middle = 1 << (weights.num_bits - 1)
        values = self._source.take(f"{layer}.weight", ("I8",), self._source.shapes[f"{layer}.weight"]).short() + middle
        if not ((values >= 0) & (values < 2 * middle)).all():
            raise RequestError(f"{self._source.place(f'{layer}.weight')} exceeds the range of {weights.num_bits} bits")
        return values

    def _read_fp8(self, layer: str, scheme: _Scheme) -> PackedRows:
        """Read E4M3 weights with a scale per tensor or channel."""
        rows, columns = self._source.shapes[f"{layer}.weight"]
        values = self._source.take(f"{layer}.weight", ("F8_E4M3",), (rows, columns))
        if values.isnan().any():
            raise RequestError(f"{self._source.place(f'{layer}.weight')} contains NaN; download the checkpoint again")
        zeros = self._zeros(layer, scheme.weights, False, (rows, 1))
        scales = self._scales_of_rows(layer, scheme.weights, rows)
        return PackedRows(8, values, scales, zeros, True, scheme.input_activations is not None)

    def _scales_of_rows(self, layer: str, weights: _Quantized, rows: int) -> Tensor:
        """Return the scales per tensor or channel, float32 [N, 1]."""
        name = f"{layer}.weight_scale"
        if weights.strategy == "tensor":
            return self._source.scales(name, (1,), (), (1, 1)).reshape(1, 1).expand(rows, 1).contiguous()
        return self._source.scales(name, (rows, 1), (rows,)).view(rows, 1)

    def _zeros(self, layer: str, weights: _Quantized, packed: bool, shape: tuple[int, int]) -> Tensor:
        """Return the signed zero points, float32 [N, G]."""
        name = f"{layer}.weight_zero_point"
        if name not in self._source and weights.symmetric:
            return torch.zeros(shape)
        if packed and not weights.symmetric:
            words = -(-shape[0] * weights.num_bits // 32)
            stored = self._source.take(name, ("I32",), (words, shape[1]))
            unpacked = unpack(stored.T.contiguous(), weights.num_bits).T[: shape[0]]
            return unpacked.float().contiguous() - (1 << (weights.num_bits - 1))
        shapes = [shape, (1,), ()] if weights.strategy == "tensor" else [shape]
        zeros = self._source.take(name, ("I8",), *shapes).float().reshape(-1, shape[1]).expand(shape).contiguous()
        if weights.symmetric and zeros.any():
            raise RequestError(
                f"{self._source.place(name)} is not zero, but the config says that weights are symmetric"
            )
        return zeros

    def _scheme(self, layer: str) -> _Scheme | None:
        """Return the scheme of a layer; a name goes before a regular expression, and that before a class."""
        kind = "Embedding" if layer.endswith("embed_tokens") else "Linear"
        if any(pattern == kind or _matches(pattern, layer) for pattern in self._ignore):
            return None
        by_name = [key for key, (pattern, _) in sorted(self._schemes.items()) if pattern == layer]
        by_pattern = [
            key
            for key, (pattern, _) in sorted(self._schemes.items())
            if isinstance(pattern, re.Pattern) and pattern.match(layer)
        ]
        found = [*by_name, *by_pattern, *(key for key in (kind, "Module") if key in self._schemes)]
        return self._schemes[found[0]][1] if found else None

    def _require_supported(self, scheme: _Scheme, place: str) -> None:
        weights, inputs = scheme.weights, scheme.input_activations
        if self._config.format == "mixed-precision" and scheme.format is None:
            raise RequestError(f"{place}: key 'format' is missing, which the format mixed-precision needs")
        if weights.num_bits not in (4, 8):
            raise RequestError(f"{place}.weights.num_bits={weights.num_bits} is not supported; supported are 4 and 8")
        if weights.strategy is None or weights.strategy == "token" or weights.dynamic:
            raise RequestError(
                f"{place}.weights: strategy={weights.strategy}, dynamic={weights.dynamic} is not supported; supported "
                "are static weights with strategy tensor, channel or group"
            )
        form = scheme.format or self._config.format
        self._require_type(scheme, form, place)
        packed = form == "pack-quantized"
        if weights.strategy == "tensor" and packed and not weights.symmetric:
            raise RequestError(f"{place}.weights: packed weights with one zero point per tensor are not supported")
        if inputs is not None and not _computable(weights, inputs):
            raise RequestError(
                f"{place}.input_activations is supported only symmetric and dynamic with 8 bits: per token for "
                "symmetric 8-bit weights per tensor or channel; of integers also in groups, which for 4-bit weights "
                "are those of the weights"
            )

    def _require_type(self, scheme: _Scheme, form: str, place: str) -> None:
        weights, inputs = scheme.weights, scheme.input_activations
        if (weights.type == "float") != (form == "float-quantized") and form != "naive-quantized":
            raise RequestError(f"{place}: weights of type {weights.type} do not have the format {form}")
        if weights.type == "float" and (weights.num_bits, weights.symmetric) != (8, True):
            raise RequestError(
                f"{place}.weights: num_bits={weights.num_bits}, symmetric={weights.symmetric} is not supported; "
                "supported floats are symmetric with 8 bits (E4M3)"
            )
        if weights.type == "float" and weights.strategy not in ("tensor", "channel"):
            raise RequestError(
                f"{place}.weights.strategy={weights.strategy} is not supported for floats; supported are tensor and "
                "channel"
            )
        if inputs is not None and inputs.type != weights.type:
            raise RequestError(
                f"{place}: weights of type {weights.type} with inputs of type {inputs.type} are not supported; both "
                "must be int or float"
            )


class _Quantized(FormatConfig):
    """How weights or activations are quantized, in compressed-tensors."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "token"] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    dynamic: bool = False
    actorder: Literal["static", "weight", "dynamic", "group"] | bool | None = None
    block_structure: None = None
    scale_dtype: Any = None
    zp_dtype: Any = None
    observer: Any = None
    observer_kwargs: Any = None


_Format = Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"]


class _Scheme(FormatConfig):
    targets: list[str]
    weights: _Quantized
    input_activations: _Quantized | None = None
    output_activations: None = None
    format: _Format | None = None


class _Config(FormatConfig):
    quant_method: str
    config_groups: Annotated[dict[str, _Scheme], Field(min_length=1)]
    format: _Format | Literal["mixed-precision"]
    ignore: list[str] | None = None
    quantization_status: Literal["compressed"] = "compressed"
    kv_cache_scheme: None = None
    sparsity_config: dict[str, Any] | None = None
    moe_sparsity_config: None = None
    transform_config: dict[str, Any] | None = None
    global_compression_ratio: Any = None
    version: Any = None
    run_compressed: Any = None


def _computable(weights: _Quantized, inputs: _Quantized) -> bool:
    """Return whether there is an op for weights with inputs that are quantized in this way."""
    if (inputs.num_bits, inputs.symmetric, inputs.dynamic) != (8, True, True):
        return False
    if weights.num_bits == 4:
        return weights.strategy == inputs.strategy == "group" and weights.group_size == inputs.group_size
    in_groups = inputs.strategy == "group" and inputs.type == "int"
    return weights.strategy != "group" and weights.symmetric and (inputs.strategy == "token" or in_groups)


def _pattern(target: str, place: str) -> re.Pattern[str] | str:
    """Return a target of compressed-tensors: a regular expression if it begins with ``re:``, else a name or class."""
    if not target.startswith("re:"):
        return target
    # A repeated group that contains a repetition may take time exponential in the length of a name.
    if len(target) > 1000 or re.search(r"[*+}]\)*[*+{]|\([^()]*[*+}|][^()]*\)\s*[*+{]", target):
        raise RequestError(f"{place}: the regular expression {target[:60]!r} is too long or has nested repetitions")
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise RequestError(f"{place}: {target!r} is no regular expression ({error})") from None


def _matches(pattern: re.Pattern[str] | str, layer: str) -> bool:
    return pattern == layer if isinstance(pattern, str) else pattern.match(layer) is not None
