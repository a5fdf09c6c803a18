"""Converts the metadata of a GGUF file to a config as in config.json of transformers.

Every key that changes what the model computes is used or refused by its name. Keys that gguf does not know either are
reported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quasar.errors import RequestError
from quasar.model.json_files import checked, warn_once

MODELS = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "pangu-embedded": ("PanguEmbeddedForCausalLM", "PanguEmbedded"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
"""The architecture and the model_type of transformers, by the architecture of the file."""

Values = dict[str, Any]
"""Metadata by key; an array of numbers is a list, any other array None."""


def raw_config(metadata: Values, tensors: Collection[str], factors: Sequence[float] | None, place: str) -> Values:
    """Return the content of config.json.

    tensors: the names of the file's tensors; factors: the values of rope_freqs.weight, None without that tensor
    place: the file, for messages

    Raises RequestError, which names the key, if the architecture is not supported, or if a value is missing, damaged
    or would change the function in a way that is not supported.
    """
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if architecture not in MODELS or kind != "model":
        raise RequestError(
            f"{place}: not a readable GGUF file of a supported architecture (general.architecture is "
            f"{architecture!r}, general.type is {kind!r}; supported are models of {', '.join(MODELS)})"
        )
    found = _own_keys(metadata, architecture, place)
    head_dim = found.key_length or found.hidden_size // found.heads
    for name, size in (("rope.dimension_count", found.dimension_count), ("attention.value_length", found.value_length)):
        if size not in (None, head_dim):
            raise RequestError(f"{place}: {architecture}.{name}={size} differs from the head size {head_dim}")
    if found.attention_scale and not math.isclose(found.attention_scale, head_dim**-0.5, rel_tol=1e-6):
        raise RequestError(
            f"{place}: {architecture}.attention.scale={found.attention_scale} is not 1 / sqrt({head_dim}), the only "
            "supported scale"
        )
    if found.sliding_window and architecture != "gemma3":
        raise RequestError(
            f"{place}: {architecture}.attention.sliding_window={found.sliding_window} changes what the model computes "
            "and is not supported"
        )
    class_name, model_type = MODELS[architecture]
    rope = _rope(found, architecture, factors, place)
    biased = "blk.0.attn_q.bias" in tensors
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": found.vocab_size,
        "hidden_size": found.hidden_size,
        "intermediate_size": found.intermediate_size,
        "num_hidden_layers": found.blocks,
        "num_attention_heads": found.heads,
        "num_key_value_heads": found.kv_heads or found.heads,
        "head_dim": head_dim,
        "max_position_embeddings": found.context_length,
        "rms_norm_eps": found.epsilon,
        **(
            _gemma3(found, head_dim, rope)
            if architecture == "gemma3"
            else {"hidden_act": "silu", "rope_parameters": rope}
        ),
        "tie_word_embeddings": "output.weight" not in tensors,
        **({"bias": biased} if model_type == "PanguEmbedded" else {}),
        **({"attention_bias": biased} if model_type in ("llama", "qwen3") else {}),
        **({"mlp_bias": "blk.0.ffn_gate.bias" in tensors} if model_type == "llama" else {}),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _stop_tokens(metadata),
    }


LARGEST_GEMMA3 = 62
"""The number of layers of Gemma 3 27B, whose attention has another scale than that of the smaller models."""


def _gemma3(found: _Metadata, head_dim: int, rope: Values) -> Values:
    """Return the keys of config.json that only Gemma 3 has.

    Files do not say that five layers out of six have a window, nor the base of their rotary embedding; llama.cpp has
    both as constants.
    """
    kinds = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(found.blocks)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": found.hidden_size // found.heads if found.blocks == LARGEST_GEMMA3 else head_dim,
        "sliding_window": found.sliding_window or 1024,
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


def _own_keys(metadata: Values, architecture: str, place: str) -> _Metadata:
    """Check the keys of the architecture."""
    own: Values = {}
    for key, value in metadata.items():
        if not key.startswith(f"{architecture}."):
            continue
        name = key.removeprefix(f"{architecture}.")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise RequestError(f"{place}: {key} differs from layer to layer, which is not supported")
            value = value[0]
        own[name] = value
    found = checked(_Metadata, own, f"{place}: metadata of {architecture}")
    for name in found.model_extra or {}:
        if name.startswith(("rope.", "attention.", "expert")) or name in _names_of_gguf():
            raise RequestError(
                f"{place}: {architecture}.{name}={own[name]} changes what the model computes and is not supported"
            )
        warn_once(f"{place}: the metadata {architecture}.{name} is not known and has no effect here")
    return found


@functools.cache
def _names_of_gguf() -> frozenset[str]:
    """Return the names of all keys that gguf knows for any architecture."""
    from gguf.constants import Keys

    keys = [value for group in vars(Keys).values() if isinstance(group, type) for value in vars(group).values()]
    nested = [
        value for group in vars(Keys.Attention).values() if isinstance(group, type) for value in vars(group).values()
    ]
    prefix = "{arch}."
    return frozenset(
        key.removeprefix(prefix) for key in (*keys, *nested) if isinstance(key, str) and key.startswith(prefix)
    )


def _stop_tokens(metadata: Values) -> int | list[int] | None:
    """Return the ids that end an answer: of the text, of a turn and of a message."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(token for token in named if token is not None))
    return found if len(found) > 1 else found[0] if found else None


def _rope(found: _Metadata, architecture: str, factors: Sequence[float] | None, place: str) -> Values:
    """Return rope_parameters as transformers names them.

    The tensor rope_freqs.weight becomes the type longrope with equal factors for texts of every length, which divides
    the frequencies in the same way. The scaling types linear and yarn of ggml are those of transformers.
    """
    base = {"rope_theta": found.freq_base or 10_000.0}
    where = f"{place}: {architecture}.rope.scaling"
    if found.factor and found.scale_linear and found.factor != found.scale_linear:
        raise RequestError(f"{where}.factor and rope.scale_linear disagree")
    # 0 stands for no scaling, and a factor without a type is linear, as in llama.cpp.
    factor = found.factor or found.scale_linear or 1.0
    kind = found.scaling_type or "linear"
    if kind == "none":
        factor = 1.0
    growth = found.attention_factor or 1.0
    if growth != 1.0 and kind != "yarn":
        raise RequestError(f"{where}.attn_factor={growth} is not supported with {where}.type={kind}")
    scaled = kind == "yarn" or factor != 1.0
    if factors is not None and any(one != 1.0 for one in factors):
        if scaled:
            raise RequestError(f"{place}: rope_freqs.weight together with {where}.type={kind} is not supported")
        return {
            **base,
            "rope_type": "longrope",
            "short_factor": list(factors),
            "long_factor": list(factors),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": found.context_length,
        }
    if not scaled:
        return {**base, "rope_type": "default"}
    if kind == "linear":
        return {**base, "rope_type": "linear", "factor": factor}
    return {
        **base,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": found.original_context_length or found.context_length,
        "attention_factor": growth * (0.1 * math.log(max(factor, 1.0)) + 1.0),
        "beta_fast": found.beta_fast or 32.0,
        "beta_slow": found.beta_slow or 1.0,
    }


_Count = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_One = Annotated[float, Field(ge=1, le=1)]
_NoLimit = Annotated[float, Field(le=0)]


class _Metadata(BaseModel):
    """The keys of a file's architecture, by their names in the file. Those that must be neutral have one value."""

    model_config = ConfigDict(strict=True, extra="allow")

    context_length: _Count
    hidden_size: Annotated[_Count, Field(alias="embedding_length")]
    intermediate_size: Annotated[_Count, Field(alias="feed_forward_length")]
    blocks: Annotated[int, Field(alias="block_count", ge=1, le=1000)]
    heads: Annotated[_Count, Field(alias="attention.head_count")]
    kv_heads: Annotated[_Count | None, Field(alias="attention.head_count_kv")] = None
    key_length: Annotated[_Count | None, Field(alias="attention.key_length")] = None
    value_length: Annotated[_Count | None, Field(alias="attention.value_length")] = None
    attention_scale: Annotated[_Number | None, Field(alias="attention.scale")] = None  # 0 stands for the usual one
    epsilon: Annotated[_Number, Field(alias="attention.layer_norm_rms_epsilon")]
    vocab_size: _Count
    dimension_count: Annotated[_Count | None, Field(alias="rope.dimension_count")] = None
    freq_base: Annotated[_Number | None, Field(alias="rope.freq_base")] = None
    scale_linear: Annotated[_Number | None, Field(alias="rope.scale_linear")] = None
    scaling_type: Annotated[Literal["none", "linear", "yarn"] | None, Field(alias="rope.scaling.type")] = None
    factor: Annotated[_Number | None, Field(alias="rope.scaling.factor")] = None
    attention_factor: Annotated[_Number | None, Field(alias="rope.scaling.attn_factor")] = None
    original_context_length: Annotated[_Count | None, Field(alias="rope.scaling.original_context_length")] = None
    beta_fast: Annotated[_Number | None, Field(alias="rope.scaling.yarn_beta_fast")] = None
    beta_slow: Annotated[_Number | None, Field(alias="rope.scaling.yarn_beta_slow")] = None
    sliding_window: Annotated[Annotated[int, Field(ge=0)] | None, Field(alias="attention.sliding_window")] = None
    # These say nothing about the function.
    finetuned: Annotated[bool | None, Field(alias="rope.scaling.finetuned")] = None
    tensor_data_layout: str | None = None
    # These change the function, and have their neutral values.
    yarn_attention: Annotated[_One | None, Field(alias="rope.scaling.yarn_attn_factor")] = None
    yarn_extrapolation: Annotated[_One | None, Field(alias="rope.scaling.yarn_ext_factor")] = None
    expert_count: Literal[0] | None = None
    expert_used_count: Literal[0] | None = None
    expert_shared_count: Literal[0] | None = None
    leading_dense_block_count: Literal[0] | None = None
    nextn_predict_layers: Literal[0] | None = None
    pooling_type: Literal[0] | None = None
    causal: Annotated[Literal[True] | None, Field(alias="attention.causal")] = None
    parallel_residual: Annotated[Literal[False] | None, Field(alias="use_parallel_residual")] = None
    clamp: Annotated[_NoLimit | None, Field(alias="attention.clamp_kqv")] = None
    alibi: Annotated[_NoLimit | None, Field(alias="attention.max_alibi_bias")] = None
    logit_scale: _One | None = None
    embedding_scale: _One | None = None
    residual_scale: _One | None = None
    attn_softcap: Annotated[_NoLimit | None, Field(alias="attn_logit_softcapping")] = None
    final_softcap: Annotated[_NoLimit | None, Field(alias="final_logit_softcapping")] = None
