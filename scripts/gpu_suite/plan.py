"""The plan of the measurements: models, shapes, numbers of rows and context lengths, at full or toy size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quasar.model.config import LayerShape, ModelConfig

GROUP_SIZE = 128
SMALL_GROUP_SIZE = 64


@dataclass(frozen=True)
class Product:
    """A linear layer [N, K] of a model."""

    model: str
    layer: str
    outputs: int
    inputs: int

    @property
    def group_size(self) -> int:
        """The group size, which is 128 if it divides K, as in most 4-bit checkpoints."""
        return GROUP_SIZE if self.inputs % GROUP_SIZE == 0 else SMALL_GROUP_SIZE


@dataclass(frozen=True)
class Plan:
    """device: where to run; tiny: toy sizes; smollm2, trace: optional files of the user."""

    device: torch.device
    tiny: bool = False
    smollm2: Path | None = None
    trace: Path | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        return (1, 6) if self.tiny else (1, 2, 4, 6, 8, 16, 32)

    @property
    def contexts(self) -> tuple[int, ...]:
        return (64,) if self.tiny else (512, 2048, 8192)

    @property
    def main_context(self) -> int:
        """The context length of the targets."""
        return 64 if self.tiny else 2048

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by name. Whole passes are timed for the last one."""
        if self.tiny:
            return {"toy": _qwen3(128, 256, 2, 4, 2, 32, 256)}
        smollm2 = LayerShape(num_heads=9, num_kv_heads=3, intermediate_size=1536)
        return {
            "SmolLM2-135M": ModelConfig(49152, 576, 64, (smollm2,) * 30, tie_word_embeddings=True),
            "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, 128, 151936),
            "Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, 128, 151936),
        }

    @property
    def products(self) -> list[Product]:
        return [product for name, config in self.models.items() for product in _products(name, config)]

    @property
    def passes_model(self) -> tuple[str, ModelConfig]:
        return list(self.models.items())[-1]


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int
) -> ModelConfig:
    shape = LayerShape(heads, kv_heads, intermediate)
    return ModelConfig(vocabulary, hidden, head_dim, (shape,) * layers, context_length=40960, qk_norm=True)


def _products(name: str, config: ModelConfig) -> list[Product]:
    shape, hidden = config.layers[0], config.hidden_size
    attention = shape.num_heads * config.head_dim
    return [
        Product(name, "qkv", attention + 2 * shape.num_kv_heads * config.head_dim, hidden),
        Product(name, "output", hidden, attention),
        Product(name, "gate_up", 2 * shape.intermediate_size, hidden),
        Product(name, "down", hidden, shape.intermediate_size),
        Product(name, "lm_head", config.vocab_size, hidden),
    ]
