"""What the families of models have besides the keys of their config.json: norms, activations, windows of layers."""

from __future__ import annotations

from typing import Any

from quasar.errors import RequestError
from quasar.model.config_keys import RawConfig

GEMMA = ("gemma2", "gemma3_text")


def family_options(raw: RawConfig, head_dim: int, place: str) -> dict[str, Any]:
    """Return the options of ModelConfig that the family decides. Raises RequestError for another activation."""
    kind = raw.model_type
    gemma = kind in GEMMA
    activation = raw.hidden_activation or raw.hidden_act or ("gelu_pytorch_tanh" if gemma else "silu")
    if (activation == "gelu_pytorch_tanh") != gemma:
        wanted = "gelu_pytorch_tanh" if gemma else "silu"
        raise RequestError(f"{place}: hidden_act={activation} is not supported for {kind}; supported is {wanted}")
    options: dict[str, Any] = {
        "qk_norm": kind in ("qwen3", "gemma3_text", "olmo2"),
        "qk_norm_whole": kind == "olmo2",
        "pre_norms": kind != "olmo2",
        "post_norms": gemma or kind == "olmo2",
        "fused_tensors": kind == "phi3",
    }
    if gemma:
        scalar = raw.query_pre_attn_scalar
        options |= {
            "norms_one_plus": True,
            "activation": "gelu",
            "embedding_multiplier": raw.hidden_size**0.5,
            "embedding_multiplier_rounded": True,
            "attention_scale": None if scalar in (None, head_dim) else float(scalar) ** -0.5,
            "attention_softcap": raw.attn_logit_softcapping,
            "logit_softcap": raw.final_logit_softcapping,
        }
    if kind == "granite":
        options |= {
            "embedding_multiplier": raw.embedding_multiplier,
            "residual_multiplier": raw.residual_multiplier,
            "attention_scale": raw.attention_multiplier,
            "logit_divisor": raw.logits_scaling,
        }
    return options


def windows_of(raw: RawConfig, place: str) -> list[int | None]:
    """Return the window of every layer; None for a layer without a window.

    Raises RequestError if layer_types does not fit the number of layers, or if it and the other keys disagree.
    """
    count, window = raw.num_hidden_layers, raw.sliding_window
    if raw.model_type in ("mistral", "phi3"):
        return [window if raw.use_sliding_window is not False else None] * count
    types = _layer_types(raw, place)
    if "sliding_attention" in types and window is None:
        raise RequestError(f"{place}: layer_types has sliding_attention, but sliding_window is not set")
    return [window if kind == "sliding_attention" else None for kind in types]


def uses_second_rope(raw: RawConfig, place: str) -> list[bool]:
    """Return which layers rotate by the second rotary embedding: Gemma 3's sliding ones, SmolLM3's without rotation."""
    count = raw.num_hidden_layers
    if raw.model_type == "gemma3_text":
        return [kind == "sliding_attention" for kind in _layer_types(raw, place)]
    if raw.model_type != "smollm3":
        return [False] * count
    rotates: list[int] = [*(raw.no_rope_layers or ())]
    if not rotates:
        rotates = [(layer + 1) % raw.no_rope_layer_interval for layer in range(count)]
    if len(rotates) != count:
        raise RequestError(
            f"{place}: no_rope_layers has {len(rotates)} entries, but num_hidden_layers is {raw.num_hidden_layers}"
        )
    return [not rotated for rotated in rotates]


def _layer_types(raw: RawConfig, place: str) -> list[str]:
    """Return whether each layer is of full_attention or sliding_attention."""
    count, kind = raw.num_hidden_layers, raw.model_type
    if raw.layer_types is not None:
        if len(raw.layer_types) != count:
            raise RequestError(
                f"{place}: layer_types has {len(raw.layer_types)} entries, but num_hidden_layers is {count}"
            )
        if "sliding_attention" in raw.layer_types and kind not in GEMMA and not raw.use_sliding_window:
            raise RequestError(
                f"{place}: layer_types has sliding_attention, but use_sliding_window={raw.use_sliding_window}, which "
                "disagree"
            )
        return [*raw.layer_types]
    if kind == "gemma2":
        slides = [layer % 2 == 0 for layer in range(count)]
    elif kind == "gemma3_text":
        pattern = raw.sliding_window_pattern or raw.other_pattern or 6
        slides = [(layer + 1) % pattern != 0 for layer in range(count)]
    elif not raw.use_sliding_window or raw.sliding_window is None:
        slides = [False] * count
    elif kind == "smollm3":
        slides = uses_second_rope(raw, place)
    else:
        # The configs of Qwen2 and Qwen3 have a window that is used only if use_sliding_window is true.
        first = 28 if raw.max_window_layers is None else raw.max_window_layers
        slides = [layer >= first for layer in range(count)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]
