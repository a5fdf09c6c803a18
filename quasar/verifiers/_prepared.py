"""Caches quantized and pruned weights between runs, so that they are read and not computed again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quasar_kernels import Fp8Weight, Int4Weight, Int8Weight
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quasar.cache import Store
from quasar.model.config import LayerShape
from quasar.model.transformer import Transformer
from quasar.quantization.layers import Fp8Linear, W4Linear, W8A8Linear, W8A16Linear
from quasar.verifiers.base import Setup

Found = dict[str, Any]
"""Results of the preparation besides the weights, such as smoothing strengths, as JSON values."""


def prepared(
    model: Transformer, setup: Setup, settings: Found, prepare: Callable[[Transformer], tuple[Transformer, Found]]
) -> tuple[Transformer, Found]:
    """Return the result of ``prepare(model)``, from the cache if an earlier run has computed it.

    settings: everything besides the model and the calibration text that affects the result of ``prepare``
    prepare: may change the model in place. It replaces the parameters that it changes, so that the others need not be
        stored
    """
    if setup.identity is None:
        return prepare(model)
    calibration = setup.calibration()
    key = {
        "model": setup.identity,
        "settings": settings,
        "calibration": None if calibration is None else {**calibration.key, "seed": calibration.seed},
    }
    made: list[Transformer] = []
    # A head that is tied to the embedding is the same parameter under a second name.
    parameters = model.named_parameters(remove_duplicate=False)
    before = {name: parameter for name, parameter in parameters if not name.startswith("blocks.")}

    def make() -> _Weights:
        result, found = prepare(model)
        made.append(result)
        return _Weights.of(result, found, before)

    weights = STORE.get(key, model.device, model.dtype, make)
    return (made[0] if made else weights.put_into(model)), weights.found


@dataclass(frozen=True)
class _Weights:
    """The weights of all decoder blocks, and those of the embedding, the final norm and the head that were changed.

    shapes:  widths of the decoder blocks
    options: the options of the model's config that the preparation may change
    layers:  options of every quantized layer, by name
    tensors: the weights' parts, by names such as ``blocks.0.mlp.down.scales``
    found:   the results of the preparation besides the weights
    """

    shapes: list[dict[str, Any]]
    options: dict[str, bool]
    layers: dict[str, Found]
    tensors: dict[str, Tensor]
    found: Found

    @staticmethod
    def of(model: Transformer, found: Found, before: Mapping[str, nn.Parameter]) -> _Weights:
        """before: parameters outside of the blocks that are not stored if the model still has them."""
        layers: dict[str, Found] = {}
        tensors: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            parts: dict[str, Tensor | None] = {
                part: value
                for part, value in module.named_parameters(recurse=False)
                if before.get(f"{name}.{part}") is not value
            }
            if isinstance(module, W8A8Linear | W8A16Linear):
                layers[name] = {"kind": type(module).__name__, "group_size": module.weight.group_size}
                parts = {"values": module.weight.values, "scales": module.weight.scales, "bias": module.bias}
            elif isinstance(module, Fp8Linear):
                layers[name] = {"kind": "Fp8Linear"}
                parts = {"values": module.weight.values, "scales": module.weight.scales, "bias": module.bias}
            elif isinstance(module, W4Linear):
                layers[name] = {"kind": "W4Linear", "int8_activations": module.int8_activations}
                layers[name]["symmetric"] = module.weight.symmetric
                parts = dict(zip(("packed", "scales", "zeros"), module.weight.canonical(), strict=True))
                parts["bias"] = module.bias
            tensors |= {f"{name}.{part}": value.detach() for part, value in parts.items() if value is not None}
        config = model.config
        shapes = [dataclasses.asdict(shape) for shape in config.layers]
        return _Weights(shapes, {name: getattr(config, name) for name in _OPTIONS}, layers, tensors, found)

    def put_into(self, model: Transformer) -> Transformer:
        """Return the model with these weights: the same model, or a new one if the blocks have other widths."""
        changes: dict[str, Any] = {"layers": tuple(LayerShape(**shape) for shape in self.shapes), **self.options}
        config = replace(model.config, **changes)
        result = model
        if config != model.config:
            with torch.device("meta"):
                result = Transformer(config)
            result.ropes, result.embedding, result.norm = model.ropes, model.embedding, model.norm
            result.lm_head = model.lm_head
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in self.tensors.items():
            owner, _, part = name.rpartition(".")
            parts.setdefault(owner, {})[part] = value.to(model.device)
        for owner, own in parts.items():
            if owner in self.layers:
                result.set_submodule(owner, _layer(self.layers[owner], own, model.dtype))
                continue
            module = result.get_submodule(owner)
            for part, value in own.items():
                setattr(module, part, nn.Parameter(value, requires_grad=False))
        return result.eval().requires_grad_(False)


_OPTIONS = ("qkv_bias", "output_bias", "gate_up_bias", "down_bias", "tie_word_embeddings")


def _layer(options: Found, parts: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    bias = None if "bias" not in parts else nn.Parameter(parts["bias"], requires_grad=False)
    if options["kind"] == "W4Linear":
        weight = Int4Weight(parts["packed"], parts["scales"], parts["zeros"], options["symmetric"], dtype)
        return W4Linear(weight, bias, 8 if options["int8_activations"] else 16)
    if options["kind"] == "Fp8Linear":
        return Fp8Linear(Fp8Weight(parts["values"], parts["scales"]), bias)
    kind = {"W8A8Linear": W8A8Linear, "W8A16Linear": W8A16Linear}[options["kind"]]
    return kind(Int8Weight(parts["values"], parts["scales"], options["group_size"]), bias)


def _save(weights: _Weights, file: Path) -> None:
    tensors = {name: value.cpu().contiguous() for name, value in weights.tensors.items()}
    fields = {name: getattr(weights, name) for name in ("shapes", "options", "layers", "found")}
    save_file(tensors, file, metadata={"weights": json.dumps(fields)})


def _load(file: Path) -> _Weights:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return _Weights(**json.loads(opened.metadata()["weights"]), tensors=tensors)


STORE = Store("verifiers", ".safetensors", _save, _load, fits_memory=False)
