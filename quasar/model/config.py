"""The shape of a model. `quasar.model.config_file` reads it from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quasar.model.json_files import read_object

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "PanguEmbedded",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
)

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe quantized weights: of transformers, of older compressed-tensors, and of MLX."""


@dataclass(frozen=True)
class LayerShape:
    """Widths and attention of one decoder block. The blocks of a pruned model may have different widths.

    window: a row attends only to the last ``window`` positions up to its own; None for no limit
    second_rope: whether the block rotates by the model's second rotary embedding
    """

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    window: int | None = None
    second_rope: bool = False


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding.

    type:       default, linear, llama3, yarn, factors, or none for no rotation
    parameters: the parameters of this scaling
    factors:    for ``factors``: the divisor of every frequency, half as many numbers as elements that are rotated
    share:      which part of a head's elements is rotated, the first ones
    """

    theta: float = 10_000.0
    type: str = "default"
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    factors: tuple[float, ...] = ()
    share: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """Return how many elements of a head are rotated."""
        return 0 if self.type == "none" else int(head_dim * self.share)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and a gated MLP.

    layers:          the decoder blocks
    second_rope:     the rotary embedding of the blocks that say so; None if no block does
    context_length:  length of the longest sequence in tokens
    qk_norm:         whether queries and keys are normalized: each head by itself, or, with ``qk_norm_whole``, all heads
        together
    pre_norms:       whether the inputs of attention and MLP are normalized
    post_norms:      whether their outputs are
    norms_one_plus:  whether the factor of a norm is 1 + weight
    activation:      of the MLP's gates: silu, or gelu, approximated by tanh
    attention_scale: factor of the products of queries and keys; None for 1 / sqrt(head_dim)
    attention_softcap, logit_softcap: caps of attention scores and of logits, ``cap * tanh(x / cap)``
    embedding_multiplier, residual_multiplier: factors of the embeddings, and of what attention and MLP add to the
        residual stream
    embedding_multiplier_rounded: whether the factor of the embeddings is rounded to the model's dtype
    logit_divisor:   divisor of the logits
    fused_tensors:   whether a checkpoint has q, k and v in one tensor, and gate and up in one, as this program does
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
    qk_norm_whole: bool = False
    second_rope: RopeConfig | None = None
    pre_norms: bool = True
    post_norms: bool = False
    norms_one_plus: bool = False
    activation: Literal["silu", "gelu"] = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    fused_tensors: bool = False

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
