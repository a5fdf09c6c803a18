"""Turns a model with low-bit layers into the tensors and ``quantization_config`` of a compressed-tensors checkpoint.

`quasar.quantization.packed_safetensors` reads it back bit for bit, and so do the engines that know the format. The
scales stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quasar_kernels.reference import unpack_int4
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.config import ModelConfig
from quasar.model.linear import QuantizedLinear
from quasar.model.tensor_names import source_names, source_shapes
from quasar.model.transformer import Transformer
from quasar.quantization.layers import Fp8Linear, PackedEmbedding, PackedLinear, W4Linear, W8A8Linear, W8A16Linear

Json = dict[str, Any]


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized, in the terms of compressed-tensors.

    group_size: weights of a row that share a scale; 0 if the whole row does
    input_bits: None if the inputs are not quantized; input_group: inputs that share a scale, 0 for all of a token
    """

    form: str
    kind: str
    bits: int
    group_size: int = 0
    symmetric: bool = True
    input_bits: int | None = None
    input_group: int = 0

    def to_json(self, targets: Sequence[str]) -> Json:
        weights = self._arguments(self.bits, self.group_size, "channel", self.symmetric, dynamic=False)
        inputs = None
        if self.input_bits is not None:
            inputs = self._arguments(self.input_bits, self.input_group, "token", True, dynamic=True)
        return {"targets": [*targets], "weights": weights, "input_activations": inputs, "format": self.form}

    def _arguments(self, bits: int, group_size: int, without_groups: str, symmetric: bool, dynamic: bool) -> Json:
        strategy: Json = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": without_groups}
        return {"num_bits": bits, "type": self.kind, **strategy, "symmetric": symmetric, "dynamic": dynamic}


@dataclass(frozen=True)
class Exported:
    """The tensors of a checkpoint by name, and its ``quantization_config``; None if nothing is quantized."""

    tensors: dict[str, Tensor]
    quantization: Json | None


def export_tensors(model: Transformer, config: ModelConfig) -> Exported:
    """Return the model as a checkpoint with this config, whose biases the model may lack: they are zeros then.

    Raises RequestError, which names the layer, for a layer that the format cannot express.
    """
    with torch.device("meta"):
        plain = Transformer(config)
    shapes = source_shapes(plain)
    tensors: dict[str, Tensor] = {}
    schemes: dict[Scheme, list[str]] = {}
    for name, sources in source_names(plain).items():
        owner, _, part = name.rpartition(".")
        module = model.get_submodule(owner)
        rows = [shapes[source][0] for source in sources]
        if part == "weight" and isinstance(module, QuantizedLinear):
            scheme, stored = _quantized(owner, module)
            layers = [source.removesuffix(".weight") for source in sources]
            schemes.setdefault(scheme, []).extend(layers)
            start = 0
            for layer, count in zip(layers, rows, strict=True):
                tensors |= {f"{layer}.{key}": value for key, value in stored(slice(start, start + count)).items()}
                start += count
        else:
            tensors |= dict(zip(sources, _dense(owner, module, part, sum(rows), model.dtype).split(rows), strict=True))
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return Exported(whole, _quantization(schemes) if schemes else None)


def _dense(owner: str, module: nn.Module, part: str, rows: int, dtype: torch.dtype) -> Tensor:
    if isinstance(module, PackedEmbedding):
        return module.table.values
    if isinstance(module, PackedLinear) and part == "weight":
        return module.weight.values
    found = getattr(module, part, None)
    if found is None and part == "bias":
        return torch.zeros(rows, dtype=dtype)
    if not isinstance(found, Tensor) or type(module).__module__.split(".")[0] == "bitsandbytes":
        raise RequestError(
            f"{owner} is a {type(module).__name__}, which no format of compressed-tensors can express; export "
            "verifier=int8, int4, fp8, pruned or fp16"
        )
    return found


Store = Callable[[slice], dict[str, Tensor]]
"""Returns the tensors of some rows of a layer, by their names after that of the layer."""


def _quantized(owner: str, module: QuantizedLinear) -> tuple[Scheme, Store]:
    if isinstance(module, Fp8Linear):
        scheme = Scheme("float-quantized", "float", 8, input_bits=8)
        return scheme, _plain_store(module.weight.values, module.weight.scales)
    if isinstance(module, W8A8Linear):
        scheme = Scheme("int-quantized", "int", 8, input_bits=8, input_group=module.weight.group_size)
        return scheme, _plain_store(module.weight.values, module.weight.scales)
    if isinstance(module, W8A16Linear):
        scales = module.weight.scales.unsqueeze(1)
        return Scheme("pack-quantized", "int", 8), _packed_store(module.weight.values.short() + 128, scales, None, 8)
    if isinstance(module, W4Linear) and module.input_order is None:
        packed, scales, zeros = module.weight.canonical()
        symmetric, size = module.weight.symmetric, module.weight.group_size
        if not symmetric and not torch.equal(zeros, zeros.round().clamp(0, 15)):
            raise RequestError(f"{owner} has zero points that are no integers, which compressed-tensors cannot express")
        inputs: Json = {"input_bits": 8, "input_group": size} if module.int8_activations else {}
        scheme = Scheme("pack-quantized", "int", 4, size, symmetric, **inputs)
        return scheme, _packed_store(unpack_int4(packed), scales, None if symmetric else zeros, 4)
    raise RequestError(
        f"{owner} is a {type(module).__name__} of a checkpoint that another tool has quantized; it is exported already"
    )


def _plain_store(values: Tensor, scales: Tensor) -> Store:
    return lambda rows: {"weight": values[rows], "weight_scale": scales[rows].unsqueeze(1)}


def _packed_store(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Store:
    """values: unsigned integers [N, K]; scales: [N, G]; zeros: [N, G] on the scale of the values, or None."""

    def store(rows: slice) -> dict[str, Tensor]:
        found = {
            "weight_packed": pack(values[rows], bits),
            "weight_scale": scales[rows],
            "weight_shape": torch.tensor(values[rows].shape),
        }
        if zeros is not None:
            found["weight_zero_point"] = pack(zeros[rows].T, bits).T
        return found

    return store


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers [R, C] to int32 [R, ceil(C * bits / 32)]: the inverse of `packed_source.unpack`."""
    shared = 32 // bits
    padded = nn.functional.pad(values.long(), (0, -values.shape[1] % shared)).unflatten(1, (-1, shared))
    words = (padded << torch.arange(0, 32, bits, device=values.device)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _quantization(schemes: dict[Scheme, list[str]]) -> Json:
    """Return the config. A single scheme has the target ``Linear``, several ones the names of their layers."""
    forms = {scheme.form for scheme in schemes}
    names = [name for layers in schemes.values() for name in layers]
    single = len(schemes) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{index}": scheme.to_json(["Linear"] if single else layers)
            for index, (scheme, layers) in enumerate(schemes.items())
        },
        "ignore": [] if "lm_head" in names else ["lm_head"],
        "quantization_status": "compressed",
    }
