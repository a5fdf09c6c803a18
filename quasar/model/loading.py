"""Loads a `Transformer` from safetensors. Loading stacks q, k and v in one weight, and so gate and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quasar.errors import RequestError
from quasar.model.config import LayerShape, ModelConfig, RopeConfig, quantization_method
from quasar.model.json_files import warn_once
from quasar.model.rope import Ropes, head_order
from quasar.model.tensor_files import TensorFiles, same
from quasar.model.tensor_names import EMBEDDING, HEAD, source_names, source_shapes
from quasar.model.transformer import Transformer

if TYPE_CHECKING:
    from quasar.model.sources import Checkpoint

Progress = Callable[[int, int], None]
"""Called with (done, total) in units of the caller's choice."""


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> Transformer:
    """Load the unquantized, unpruned model of a checkpoint, or create it if its weights are random.

    Raises RequestError like `load_transformer`.
    """
    if checkpoint.folder is None:
        return random_transformer(tiny_config(), checkpoint.seed, dtype, device)
    return load_transformer(checkpoint.folder, dtype, device, progress)


def load_transformer(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Transformer:
    """Load a Hugging Face checkpoint of a supported architecture.

    Raises RequestError for an unsupported architecture, quantized weights, a corrupt file, and tensors that are not
    exactly those that the config implies; the message names the file.
    """
    from quasar.model.config_file import read_config  # needs pydantic, which the GPU suite does without

    config = read_config(folder)
    if (method := quantization_method(folder)) is not None:
        raise RequestError(
            f"{folder}: its weights are quantized ({method}), so it is no reference as it is. Measure it with "
            "verifier=packed verifier.path=FOLDER against the unquantized model, or pass model.dequantize=true to use "
            "its dequantized weights"
        )
    tensors = TensorFiles(folder)
    config = tied_as_stored(config, tensors)
    with torch.device("meta"):
        model = Transformer(config)
    model.to(dtype)
    names = source_names(model)
    if config.tie_word_embeddings and EMBEDDING not in tensors and HEAD in tensors:
        names["embedding.weight"] = [HEAD]  # transformers ties in both directions
    _require_exact(model, names, tensors)
    for done, (name, sources) in enumerate(names.items()):
        if progress is not None:
            progress(done, len(names))
        stacked = torch.cat([tensors.read_float(source).to(dtype) for source in sources])
        owner, _, attribute = name.rpartition(".")
        if owner.endswith("attention.qkv"):
            stacked = in_head_order(stacked, config, config.layers[int(owner.split(".")[1])])
        parameter = nn.Parameter(stacked.to(device=device), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, parameter)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embedding.weight
    if progress is not None:
        progress(len(names), len(names))
    model.ropes = Ropes(config).to(device)
    return model.eval().requires_grad_(False)


def in_head_order(stacked: Tensor, config: ModelConfig, shape: LayerShape) -> Tensor:
    """Reorder the elements of the heads of q and k, in weights or biases [(H + 2 H_kv) D, ...]; see `head_order`."""
    order = head_order(config.rope, config.head_dim)
    if order is None:
        return stacked
    heads = stacked.unflatten(0, (-1, config.head_dim)).clone()
    rotated = shape.num_heads + shape.num_kv_heads
    heads[:rotated] = heads[:rotated, order]
    return heads.flatten(0, 1)


def tied_as_stored(config: ModelConfig, tensors: TensorFiles) -> ModelConfig:
    """Return the config with ``tie_word_embeddings`` as transformers 5 sets it for these tensors.

    A checkpoint that contains different weights for embedding and lm_head is not tied, whatever its config says.
    """
    if not config.tie_word_embeddings or HEAD not in tensors or EMBEDDING not in tensors:
        return config
    if same(tensors.read(HEAD), tensors.read(EMBEDDING)):
        return config
    warn_once(
        f"{tensors.folder}/config.json: tie_word_embeddings is true, but {HEAD} and {EMBEDDING} differ; as in "
        "transformers, they are not tied"
    )
    return replace(config, tie_word_embeddings=False)


def random_transformer(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """Return a model with random weights, which are the same for a seed on every machine.

    Weights are normally distributed with standard deviation 1 / sqrt(fan-in), so that activations keep their scale and
    the logits are as peaked as those of a small trained model.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 1.0 if name.startswith("embedding") else parameter.shape[1] ** -0.5
            parameter.data.normal_(0.0, deviation, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.1, generator=generator)
    model.to(device=device, dtype=dtype)
    # The rotary frequencies stay in float32, as in a model that is loaded.
    model.ropes = Ropes(config).to(device)
    return model.eval().requires_grad_(False)


def tiny_config(vocab_size: int = 512, num_layers: int = 4, context_length: int = 16384) -> ModelConfig:
    """Return the config of ``model=tiny``. It is small, has grouped heads, and low-bit groups divide its widths."""
    shape = LayerShape(num_heads=4, num_kv_heads=2, intermediate_size=256)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        head_dim=32,
        layers=(shape,) * num_layers,
        rope=RopeConfig(),
        context_length=context_length,
    )


def _require_exact(model: Transformer, names: dict[str, list[str]], tensors: TensorFiles) -> None:
    """Require that the files contain the tensors that the model has, in their shapes, and no others."""
    shapes = source_shapes(model)
    if names["embedding.weight"] == [HEAD]:
        shapes[HEAD] = shapes.pop(EMBEDDING)
    tensors.require_shapes(shapes)
    # A tied checkpoint may contain the weight twice; `tied_as_stored` has compared the two.
    tensors.require_only([*shapes, HEAD] if model.config.tie_word_embeddings else shapes, "config.json does not imply")
