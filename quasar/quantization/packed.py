"""Loads quantized checkpoints without requantizing them: their integers and scales become quantized linear layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from quasar_kernels import Fp8Weight, GroupInt8Weight, GroupNumbers, InputOrder, Int4Weight, Int8Weight
from quasar_kernels.reference import pack_int4
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.config import ModelConfig
from quasar.model.linear import QuantizedLinear
from quasar.model.loading import Progress, load_model
from quasar.model.rope import Ropes, head_order
from quasar.model.sources import Checkpoint
from quasar.model.tensor_names import EMBEDDING, source_names
from quasar.model.transformer import Transformer
from quasar.quantization.layers import Fp8Linear, GroupInt8Linear, QuantizedEmbedding, W4Linear, W8A8Linear, W8A16Linear
from quasar.quantization.packed_blocks import BlockRows, layer_of_blocks
from quasar.quantization.packed_gguf import GGUFCheckpoint
from quasar.quantization.packed_rows import PackedRows
from quasar.quantization.packed_safetensors import SafetensorsCheckpoint


class PackedCheckpoint(Protocol):
    """A checkpoint on disk. Its tensors are accessed by their Hugging Face names."""

    path: Path
    config: ModelConfig

    def __contains__(self, name: str) -> bool: ...

    def dense(self, name: str) -> Tensor:
        """Return a tensor as floats; it is dequantized if it is stored quantized."""
        ...

    def packed(self, name: str) -> PackedRows | BlockRows | None:
        """Return the quantized weight of a linear layer; None if it is stored as floats."""
        ...

    def require_all_read(self) -> None:
        """Raise RequestError if the checkpoint contains tensors that have not been read."""
        ...


QuantizedLayer = W4Linear | W8A8Linear | W8A16Linear | Fp8Linear | GroupInt8Linear


def open_packed(path: Path) -> PackedCheckpoint:
    """Open a GGUF file, or a folder with compressed-tensors, GPTQ, AWQ or bitsandbytes safetensors.

    Raises RequestError if the path is neither; the message names the path and the supported formats.
    """
    if not path.exists():
        raise RequestError(f"verifier.path={path}: no such file or folder; pass a .gguf file or a checkpoint folder")
    return GGUFCheckpoint(path) if path.is_file() else SafetensorsCheckpoint(path)


def load_reference(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress) -> Transformer:
    """Load the unpruned model of a checkpoint in ``dtype``; quantized weights are dequantized if that was asked for."""
    if not checkpoint.dequantized:
        return load_model(checkpoint, dtype, device, progress)
    assert checkpoint.folder is not None
    return load_packed(open_packed(checkpoint.folder), dtype, device, 16, progress, dequantize=True)


def quantized_share(path: Path) -> float:
    """Return the share of a checkpoint's matrix weights that are stored quantized."""
    checkpoint = SafetensorsCheckpoint(path)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items() if len(shape) == 2}
    return sum(size for name, size in sizes.items() if checkpoint.quantizes(name)) / sum(sizes.values())


def storage(model: Transformer) -> tuple[str, ...]:
    """Return a sentence on every format that the quantized layers of a model are stored in."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
    forms = Counter(_form(layer.weight) for layer in layers)
    return tuple(
        f"{count} {'layer is' if count == 1 else 'layers are'} stored as {form}" for form, count in forms.items()
    )


def _form(weight: Int4Weight | Int8Weight | Fp8Weight | GroupInt8Weight) -> str:
    values = {Int4Weight: "4-bit integers", Fp8Weight: "FP8 (E4M3)"}.get(type(weight), "int8")
    per_output = isinstance(weight, Int8Weight | Fp8Weight)
    scales = "with a scale per output" if per_output else f"in groups of {weight.group_size}"
    return f"{values} {scales}, {weight.nbytes * 8 / (weight.outputs * weight.inputs):.3g} bits per weight"


def load_packed(
    checkpoint: PackedCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    activation_bits: int,
    progress: Progress,
    dequantize: bool = False,
) -> Transformer:
    """Load the model of a checkpoint. Its quantized linear layers stay quantized; everything else is in ``dtype``.

    activation_bits: 8 also quantizes the inputs of the 4-bit layers of the decoder blocks
    dequantize: whether the quantized layers are in ``dtype`` too

    Raises RequestError if the tensors are not exactly those that the checkpoint's config implies, and for heads that
    are rotated in part, whose rows would have to change places.
    """
    if head_order(checkpoint.config.rope, checkpoint.config.head_dim) is not None:
        raise RequestError(
            f"{checkpoint.path}: partial_rotary_factor={checkpoint.config.rope.share} is supported for unquantized "
            "weights only; pass the unquantized checkpoint, and quantize it with verifier=int8 or int4"
        )
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    model.to(dtype)
    names = source_names(model)
    for done, (name, sources) in enumerate(names.items()):
        progress(done, len(names))
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        kept = not dequantize and _may_be_packed(name, module, checkpoint)
        parts = _quantized_parts(checkpoint, sources) if kept else []
        if not parts:
            dense = torch.cat([checkpoint.dense(source) for source in sources])
            _require_shape(checkpoint, sources, dense, model.get_parameter(name))
            # The ops add the bias of a quantized layer in float32, as quantizers leave it after folding scales into it.
            wide = (
                attribute == "bias" and isinstance(module, QuantizedLinear) and not isinstance(module, GroupInt8Linear)
            )
            parameter = dense.to(device=device, dtype=torch.float32 if wide else dtype)
            setattr(module, attribute, nn.Parameter(parameter, requires_grad=False))
            continue
        _require_shape(checkpoint, sources, torch.cat([part.values for part in parts]), model.get_parameter(name))
        bits = activation_bits if owner.startswith("blocks.") else 16
        rows = [part for part in parts if isinstance(part, PackedRows)]
        blocks = [part for part in parts if isinstance(part, BlockRows)]
        layer: QuantizedLayer
        if blocks:
            layer = layer_of_blocks(blocks, dtype, device, bits)
        else:
            layer = _layer(checkpoint, sources, rows, dtype, device, bits)
        if sources == [EMBEDDING]:
            assert not isinstance(layer.weight, Fp8Weight)  # only GGUF stores embeddings so, and it has no FP8
            model.set_submodule(owner, QuantizedEmbedding(layer.weight, dtype))
            owner = "lm_head"
        model.set_submodule(owner, layer)
        if isinstance(module, nn.Linear) and module.bias is not None:
            layer.bias = module.bias  # still on the meta device; its values are loaded in a later iteration
    progress(len(names), len(names))
    checkpoint.require_all_read()
    if checkpoint.config.tie_word_embeddings and isinstance(model.embedding, nn.Embedding):
        model.lm_head.weight = model.embedding.weight
    model.ropes = Ropes(checkpoint.config).to(device)
    return model.eval().requires_grad_(False)


def _may_be_packed(name: str, module: nn.Module, checkpoint: PackedCheckpoint) -> bool:
    if isinstance(module, nn.Embedding):
        # Of an embedding that is not the output layer too, a pass reads only a few rows.
        return checkpoint.config.tie_word_embeddings and isinstance(checkpoint, GGUFCheckpoint)
    return isinstance(module, nn.Linear) and name.endswith(".weight")


def _quantized_parts(checkpoint: PackedCheckpoint, sources: Sequence[str]) -> list[PackedRows | BlockRows]:
    """Return the weights that form one matrix; none if they are stored as floats."""
    parts = [checkpoint.packed(source) for source in sources]
    found = [part for part in parts if part is not None]
    if 0 < len(found) < len(parts):
        raise RequestError(f"{checkpoint.path}: some of {', '.join(sources)} are quantized and some are not")
    return found


def _require_shape(checkpoint: PackedCheckpoint, sources: Sequence[str], found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise RequestError(
            f"{checkpoint.path}: {', '.join(sources)} have shape {tuple(found.shape)}, but the config implies "
            f"{tuple(expected.shape)}; config and weights do not belong together"
        )


def _layer(
    checkpoint: PackedCheckpoint,
    sources: Sequence[str],
    parts: Sequence[PackedRows],
    dtype: torch.dtype,
    device: torch.device,
    activation_bits: int,
) -> QuantizedLayer:
    """Build one layer from the stacked rows of its parts."""
    first = parts[0]
    kinds = {
        (part.bits, part.values.dtype, part.scales.shape[1], part.quantized_inputs, part.input_group) for part in parts
    }
    if len(kinds) > 1 or any(not _same_order(part.order, first.order) for part in parts):
        raise RequestError(
            f"{checkpoint.path}: {', '.join(sources)} are quantized in different formats or with different orders of "
            "their inputs, but form one layer here. Pass model.path=FOLDER model.dequantize=true to dequantize them"
        )
    values = torch.cat([part.values for part in parts]).to(device)
    scales = torch.cat([part.scales for part in parts]).float().to(device)
    zeros = torch.cat([part.zeros for part in parts]).float().to(device)
    order = None if first.order is None else InputOrder(first.order.to(device))
    symmetric = all(part.symmetric for part in parts)
    if first.bits == 4:
        weight = Int4Weight(pack_int4(values), scales, zeros, symmetric, dtype)
        return W4Linear(weight, None, 8 if first.quantized_inputs else activation_bits, order)
    if values.dtype == torch.float8_e4m3fn:
        if not first.quantized_inputs:
            raise RequestError(
                f"{checkpoint.path}: {', '.join(sources)} are FP8 with inputs in 16 bit, which is not supported. Pass "
                "model.path=FOLDER model.dequantize=true to dequantize them"
            )
        return Fp8Linear(Fp8Weight(values, scales.squeeze(1)), None)
    if scales.shape[1] == 1 and symmetric:
        layer = W8A8Linear if first.quantized_inputs else W8A16Linear
        return layer(Int8Weight(values, scales.squeeze(1), first.input_group), None)
    # The minimum, zero times scale, is not rounded either.
    stored = GroupNumbers.compact(scales)
    minimums = None if symmetric else GroupNumbers(stored.values, zeros.to(torch.int8))
    return GroupInt8Linear(GroupInt8Weight(values, stored, minimums), None, order)


def _same_order(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))
