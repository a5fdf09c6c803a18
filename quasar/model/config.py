"""The shape of a model. `quasar.model.config_file` reads it from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from quasar.model.json_files import read_object

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "PanguEmbedded")

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe quantized weights: of transformers, of older compressed-tensors, and of MLX."""


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder block. The blocks of a pruned model may have different widths."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding.

    type:       default, linear, llama3, yarn or factors
    parameters: the parameters of this scaling
    factors:    for ``factors``: the divisor of every frequency, head_dim / 2 numbers
    """

    theta: float = 10_000.0
    type: str = "default"
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU.

    context_length: length of the longest sequence in tokens. For sliding-window attention it is at most the window,
        because the result equals full attention only within the window
    """

    vocab_size: int
    hidden_size: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    context_length: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    qk_norm: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def quantization_method(folder: Path) -> str | None:
    """Return how the weights of a checkpoint folder are quantized, as its config.json says; None if they are not.

    Raises RequestError if the file is missing or damaged.
    """
    raw = read_object(folder / "config.json")
    for key in QUANTIZATION_KEYS:
        if (entry := raw.get(key)) not in (None, {}):
            method = entry.get("quant_method") if isinstance(entry, dict) else None
            return method if isinstance(method, str) else key
    return None
