"""The keys of a config.json: which are used, which are harmless, and which are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quasar.errors import RequestError
from quasar.model.config import QUANTIZATION_KEYS
from quasar.model.json_files import checked, warn_once

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StrictKeys(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class RawConfig(StrictKeys):
    """The keys of config.json that are used. The bounds are far above those of every published model."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model_type: str
    architectures: list[str] | None = None
    hidden_act: Literal["silu", "swish", "gelu_pytorch_tanh"] | None = None
    hidden_activation: Literal["gelu_pytorch_tanh"] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=1 << 23)]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Annotated[int, Field(ge=1, le=4096)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=4096)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=4096)] | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1e-6
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 40)] = 2048
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    tie_word_embeddings: bool | None = False
    attention_bias: bool | None = None
    bias: bool | None = None
    mlp_bias: bool | None = False
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None  # checked where it is used, in `quasar.model.tokenizer`
    # These belong to one family each, see `_OWN_KEYS`.
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    query_pre_attn_scalar: Positive | None = None
    rope_local_base_freq: Positive | None = None
    sliding_window_pattern: Annotated[int, Field(ge=1)] | None = None
    # transformers writes it beside layer_types.
    other_pattern: Annotated[int | None, Field(ge=1, alias="_sliding_window_pattern")] = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    no_rope_layers: list[Literal[0, 1]] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1)] = 4
    attention_multiplier: Positive = 1.0
    embedding_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    residual_multiplier: Positive = 1.0


def read_keys(raw: dict[str, Any], kind: str, place: str) -> RawConfig:
    """Return the keys that are used. A key that is missing has the value that transformers gives to it.

    kind: the model type

    Raises RequestError, which names the key, for a value of a wrong type or out of range, and for a key that would
    change the function in a way that is not supported. Warns once about a key that is on no list.
    """
    for key, value in raw.items():
        neutral = None if key in _OWN_KEYS.get(kind, ()) else _REFUSED.get(key)
        if neutral is not None and value is not None and value not in neutral:
            raise RequestError(f"{place}: {key}={value} changes what the model computes and is not supported")
    known = {*RawConfig.model_fields, "_sliding_window_pattern", *_HARMLESS, *_REFUSED, *QUANTIZATION_KEYS}
    for key in raw:
        if key not in known:
            warn_once(f"{place}: the key {key!r} is not known and has no effect here")
    return checked(RawConfig, {**_DEFAULTS.get(kind, {}), **raw}, place)


# What transformers assumes if a key is missing, where it differs from `RawConfig`'s default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
    },
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "smollm3": {"max_position_embeddings": 32_768, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "olmo2": {"rms_norm_eps": 1e-5},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}

# Keys of one family, which `_REFUSED` refuses for all others.
_OWN_KEYS: dict[str, set[str]] = {
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"},
    "gemma3_text": {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"},
    "phi3": {"partial_rotary_factor"},
    "smollm3": {"no_rope_layers"},
    "granite": {"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"},
}

_HARMLESS = {
    "_model_name_or_path",
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "attention_dropout",  # training
    "attn_implementation",
    "auto_map",  # code in a checkpoint is never executed
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "finetuning_task",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "mlp_dropout",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",  # splits matmuls, whose sum is the same
    "problem_type",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
}
"""Keys that do not affect the function that the model computes."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (1, 1.0),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "full_attention_interval": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "rope_interleaved": (False,),
    "rotary_pct": (1, 1.0),
    "rotation": ({}, False),
    "rotation_config": ({}, False),
    "transform_config": ({}, False),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
"""Keys that change the function, with the values besides null at which they do not."""
