"""The shape of a model, and reading it from a checkpoint's ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quasar.errors import RequestError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "PanguEmbedded")


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder block. The blocks of a pruned model may have different widths."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. type: default, linear, llama3 or yarn; parameters: the parameters of this scaling."""

    theta: float = 10_000.0
    type: str = "default"
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)


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

    @staticmethod
    def read(folder: Path) -> ModelConfig:
        """Read ``config.json`` of a checkpoint folder.

        Raises RequestError if the file is missing or damaged, or if the architecture is not supported.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(
                f"{folder}: contains no config.json; name a folder with a Hugging Face checkpoint"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"{path}: not valid JSON ({error}); download the checkpoint again") from None
        try:
            return ModelConfig.from_json(raw, place=str(path))
        except KeyError as missing:
            raise RequestError(f"{path}: key {missing} is missing; the checkpoint's config is incomplete") from None

    @staticmethod
    def from_json(raw: dict[str, Any], place: str = "config.json") -> ModelConfig:
        """Convert a config of transformers 4 or 5 to a ModelConfig."""
        kind = raw.get("model_type")
        if kind not in SUPPORTED:
            names = ", ".join(SUPPORTED)
            architecture = ", ".join(raw.get("architectures") or []) or "unnamed"
            raise RequestError(
                f"{place}: model_type {kind!r} (architecture {architecture}) is not supported; supported are {names}"
            )
        activation = raw.get("hidden_act", "silu")
        if activation != "silu":
            raise RequestError(f"{place}: hidden_act {activation!r} is not supported; only 'silu' (SwiGLU) is")
        heads = raw["num_attention_heads"]
        shape = LayerShape(heads, raw.get("num_key_value_heads") or heads, raw["intermediate_size"])
        attention_bias = bool(raw.get("attention_bias", raw.get("bias", False)))
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            layers=(shape,) * raw["num_hidden_layers"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=_rope(raw, place),
            context_length=_context_length(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or kind == "qwen2",
            # Qwen2 has biases for q, k and v only. The flag of Llama and Pangu includes the output projection.
            output_bias=attention_bias and kind != "qwen2",
            gate_up_bias=bool(raw.get("mlp_bias", False)),
            down_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
        )


def _rope(raw: dict[str, Any], place: str) -> RopeConfig:
    # transformers 5 writes rope_parameters. Earlier versions write rope_theta and, optionally, rope_scaling.
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(settings.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    kind = str(settings.pop("rope_type", None) or settings.pop("type", None) or "default")
    settings.pop("type", None)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise RequestError(
            f"{place}: rope scaling {kind!r} is not supported; supported are default, linear, llama3 and yarn"
        )
    if kind == "yarn":
        settings.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    return RopeConfig(theta, kind, {key: float(value) for key, value in settings.items() if value is not None})


def _context_length(raw: dict[str, Any]) -> int:
    length = int(raw.get("max_position_embeddings", 2048))
    window = raw.get("sliding_window")
    # The configs of Qwen2 and Qwen3 contain a window that is used only if use_sliding_window is true.
    if window and raw.get("use_sliding_window", raw.get("model_type") == "mistral"):
        return min(length, int(window))
    return length
