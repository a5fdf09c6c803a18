"""The memory that models need, computed from the shapes of their weights. Nothing here is measured."""

from __future__ import annotations

import torch
from torch import nn

from quasar.model.config import LayerShape, ModelConfig
from quasar.model.transformer import Transformer
from scripts.docs.markdown import row, table_head

INT4_GROUP = 64
"""The default of ``verifier.group_size``."""

MODELS = {
    "Qwen3-0.6B": ModelConfig(
        151936, 1024, 128, (LayerShape(16, 8, 3072),) * 28, qk_norm=True, tie_word_embeddings=True
    ),
    "openPangu-Embedded-7B-V1.1": ModelConfig(
        153376, 4096, 128, (LayerShape(32, 8, 12800),) * 34, qkv_bias=True, output_bias=True
    ),
    "Qwen3-8B": ModelConfig(151936, 4096, 128, (LayerShape(32, 8, 12288),) * 36, qk_norm=True),
}
"""The shapes in the config.json of each model."""


def table() -> str:
    """Return the table of memory in GB (10^9 bytes)."""
    heads = [
        "model",
        "parameters",
        "`fp16`",
        "`int8`",
        "`int4`",
        "KV cache, 1,000 tokens",
        "reference beside it",
        "float32 copy",
    ]
    lines = [table_head(*heads)]
    for name, config in MODELS.items():
        weights = {bits: weight_bytes(config, bits) for bits in (32, 16, 8, 4)}
        sizes = [weights[16], weights[8], weights[4], 1000 * kv_bytes(config), weights[16], weights[32]]
        billions = f"{parameters(config) / 1e9:.2f} billion"
        lines.append(row(name, billions, *(f"{size / 1e9:.2f}" for size in sizes)))
    return "\n".join(lines)


def parameters(config: ModelConfig) -> int:
    """Return the number of weights of a model; an embedding that is also the head counts once."""
    return sum(parameter.numel() for parameter in _model(config).parameters())


def weight_bytes(config: ModelConfig, bits: int) -> int:
    """Return the bytes of all weights if the blocks' linear layers have ``bits`` bits per weight.

    With 8 bits they have a float32 scale per output channel, with 4 a 16-bit scale per group. The embedding, the head
    and the norms have 16 bits, or 32 with ``bits`` 32.
    """
    model = _model(config)
    dense = 4 if bits == 32 else 2
    total = dense * sum(parameter.numel() for parameter in model.parameters())
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear) and bits < 16:
            outputs, inputs = module.weight.shape
            scales = 4 * outputs if bits == 8 else 2 * outputs * inputs // INT4_GROUP
            total += outputs * inputs * bits // 8 + scales - dense * outputs * inputs
    return total


def kv_bytes(config: ModelConfig) -> int:
    """Return the bytes of 16-bit keys and values per token of context."""
    return sum(2 * 2 * layer.num_kv_heads * config.head_dim for layer in config.layers)


def _model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)
