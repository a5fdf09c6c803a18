"""Reads quantized safetensors in the format of their ``quantization_config``: compressed-tensors, GPTQ or AWQ.

Nothing is guessed from a shape: the config says how every tensor is encoded, and a key, tensor, dtype or shape that
does not follow from it is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.config_file import read_config
from quasar.model.json_files import checked, read_object
from quasar.model.loading import tied_as_stored
from quasar.model.tensor_files import TensorFiles
from quasar.model.tensor_names import source_shapes
from quasar.model.transformer import Transformer
from quasar.quantization.packed_rows import PackedRows

# Positions of eight consecutive outputs in an int32 of AWQ (AutoAWQ's GEMM layout).
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class SafetensorsCheckpoint:
    """Implements `PackedCheckpoint` for a folder.

    Raises RequestError if the format is not supported. Supported are compressed-tensors (integers of 4 or 8 bits, per
    tensor, channel or group, and FP8 per tensor or channel), GPTQ of 4 or 8 bits, and 4-bit AWQ.
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
        self._source = _Source(self._tensors, self.shapes)
        self._reader: _Reader = _READERS[method](entry, f"{path}/config.json: {key}", self._source)

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


class _Source:
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
        scales = self.take(name, ("F32", "F16", "BF16"), *shapes).float()
        if not scales.isfinite().all():
            raise RequestError(f"{self.place(name)} contains NaN or infinite values; download the checkpoint again")
        return scales


class _Reader(Protocol):
    def __init__(self, entry: dict[str, Any], place: str, source: _Source) -> None: ...

    def quantizes(self, layer: str) -> bool:
        """Whether the layer is stored quantized."""
        ...

    def read(self, layer: str) -> PackedRows: ...


class _Strict(BaseModel):
    """Keys of a format. Those that do not change the stored weights are of type Any."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Quantized(_Strict):
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


class _Scheme(_Strict):
    targets: list[str]
    weights: _Quantized
    input_activations: _Quantized | None = None
    output_activations: None = None
    format: _Format | None = None


class _CompressedConfig(_Strict):
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


class _Compressed:
    """compressed-tensors, whose config assigns a scheme to every layer by its name or class.

    ``weight_packed`` is int32 [N, K * bits / 32] with the first value in the low bits and 2^(bits - 1) added;
    ``weight`` is int8 or float8_e4m3fn [N, K]. Zero points of ``weight_packed`` are packed in that way, but along the
    outputs.
    """

    def __init__(self, entry: dict[str, Any], place: str, source: _Source) -> None:
        for key in ("transform_config", "sparsity_config"):
            value = entry.get(key)
            if value and not (key == "sparsity_config" and value == {"format": "dense"}):
                raise RequestError(
                    f"{place}.{key} changes what the model computes and is not supported; use a checkpoint without it"
                )
        self._place, self._source = place, source
        self._config = checked(_CompressedConfig, entry, place)
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
        size = _group_size(
            weights.group_size if weights.strategy == "group" else -1, columns, f"{self._place}: {layer}"
        )
        groups = columns // size
        offset = 1 << (weights.num_bits - 1)
        packed = (scheme.format or self._config.format) == "pack-quantized"
        if packed:
            shape = source.take(f"{layer}.weight_shape", ("I64", "I32"), (2,)).tolist()
            if shape != [rows, columns]:
                raise RequestError(f"{source.place(f'{layer}.weight_shape')} is {shape}, not {[rows, columns]}")
            words = -(-columns * weights.num_bits // 32)
            stored = source.take(f"{layer}.weight_packed", ("I32",), (rows, words))
            values = unpack(stored, weights.num_bits)[:, :columns]
        else:
            values = source.take(f"{layer}.weight", ("I8",), (rows, columns)).short() + offset
            if not ((values >= 0) & (values < 2 * offset)).all():
                raise RequestError(f"{source.place(f'{layer}.weight')} exceeds the range of {weights.num_bits} bits")
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
            input_group = _group_size(inputs.group_size, columns, f"{self._place}: inputs of {layer}")
        return PackedRows(8, signed, scales, zeros - offset, symmetric, inputs is not None, order, input_group)

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


class _GptqConfig(_Strict):
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


class _Gptq:
    """GPTQ: ``qweight``, int32 [K / 8, N] packed along the inputs, and ``qzeros``, int32 [G, N / 8].

    Except in the format gptq_v2, the stored zeros are smaller by 1 than the real ones.
    """

    def __init__(self, entry: dict[str, Any], place: str, source: _Source) -> None:
        self._place, self._source = place, source
        self._config = checked(_GptqConfig, entry, place)
        formats = {self._config.checkpoint_format, self._config.format} - {None}
        if len(formats) > 1:
            raise RequestError(f"{place}: checkpoint_format and format disagree; delete the wrong one")
        self._stored_whole = formats == {"gptq_v2"}

    def quantizes(self, layer: str) -> bool:
        return f"{layer}.qweight" in self._source

    def read(self, layer: str) -> PackedRows:
        source = self._source
        rows, columns = source.shapes[f"{layer}.weight"]
        size = _group_size(self._config.group_size, columns, f"{self._place}: {layer}")
        groups = columns // size
        bits, middle = self._config.bits, 1 << (self._config.bits - 1)
        shared = 32 // bits
        _require_multiple(rows, columns, shared, f"{self._place}: {layer}")
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


class _AwqConfig(_Strict):
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


class _Awq:
    """AWQ: ``qweight``, int32 [K, N / 8], and ``qzeros``, int32 [G, N / 8], packed along the outputs."""

    def __init__(self, entry: dict[str, Any], place: str, source: _Source) -> None:
        self._place, self._source = place, source
        self._config = checked(_AwqConfig, entry, place)

    def quantizes(self, layer: str) -> bool:
        return f"{layer}.qweight" in self._source

    def read(self, layer: str) -> PackedRows:
        source = self._source
        rows, columns = source.shapes[f"{layer}.weight"]
        groups = columns // _group_size(self._config.group_size, columns, f"{self._place}: {layer}")
        _require_multiple(rows, columns, 8, f"{self._place}: {layer}")

        def in_order(name: Literal["qweight", "qzeros"], length: int) -> Tensor:
            stored = unpack(source.take(f"{layer}.{name}", ("I32",), (length, rows // 8)), 4)
            return stored.view(length, -1, 8)[:, :, list(AWQ_ORDER)].flatten(1).T.contiguous()

        zeros = in_order("qzeros", groups).float()
        scales = source.scales(f"{layer}.scales", (groups, rows)).T.contiguous()
        return PackedRows(4, in_order("qweight", columns), scales, zeros, bool((zeros == 8).all()))


_READERS: dict[str, type[_Reader]] = {"compressed-tensors": _Compressed, "gptq": _Gptq, "awq": _Awq}


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


def _computable(weights: _Quantized, inputs: _Quantized) -> bool:
    """Return whether there is an op for weights with inputs that are quantized in this way."""
    if (inputs.num_bits, inputs.symmetric, inputs.dynamic) != (8, True, True):
        return False
    if weights.num_bits == 4:
        return weights.strategy == inputs.strategy == "group" and weights.group_size == inputs.group_size
    in_groups = inputs.strategy == "group" and inputs.type == "int"
    return weights.strategy != "group" and weights.symmetric and (inputs.strategy == "token" or in_groups)


def _group_size(configured: int | None, columns: int, place: str) -> int:
    size = columns if configured in (None, -1) else configured
    assert size is not None
    if size < 1 or columns % size:
        raise RequestError(f"{place}: group_size={configured} does not divide its {columns} inputs")
    return size


def _require_multiple(rows: int, columns: int, shared: int, place: str) -> None:
    if rows % shared or columns % shared:
        raise RequestError(f"{place} has shape {[rows, columns]}, and {shared} values share an integer in this format")


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
