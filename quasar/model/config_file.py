"""Reads the config.json of a checkpoint: which keys are used, which are harmless, and which are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quasar.errors import RequestError
from quasar.model.config import QUANTIZATION_KEYS, SUPPORTED, LayerShape, ModelConfig, RopeConfig
from quasar.model.json_files import checked, read_object, warn_once


def read_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder.

    Raises RequestError if the file is missing or damaged, or if it describes a model that is not supported.
    """
    path = folder / "config.json"
    return config_of(read_object(path), str(path))


def config_of(raw: dict[str, Any], place: str = "config.json") -> ModelConfig:
    """Convert a config of transformers 4 or 5 to a ModelConfig.

    A key that is missing has the value that transformers gives to it. Raises RequestError, which names the key, for a
    value of a wrong type or out of range, for a key that would change the function in a way that is not supported, and
    for two spellings of one setting that disagree. Warns once about a key that is not known.
    """
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        names = ", ".join(SUPPORTED)
        architectures = raw.get("architectures")
        architecture = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "unnamed"
        raise RequestError(
            f"{place}: model_type {kind!r} (architecture {architecture}) is not supported; supported are {names}"
        )
    _require_understood(raw, place)
    found = checked(_Raw, {**_DEFAULTS.get(kind, {}), **raw}, place)
    heads = found.num_attention_heads
    kv_heads = found.num_key_value_heads or heads
    if heads % kv_heads:
        raise RequestError(f"{place}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    head_dim = found.head_dim or found.hidden_size // heads
    if head_dim == 0 or head_dim % 2:
        raise RequestError(f"{place}: head_dim={head_dim}: must be even and at least 2 for the rotary embedding")
    # The flag includes the output projection. Qwen2 has no flag, and biases for q, k and v only.
    bias = found.bias if kind == "PanguEmbedded" else None
    biases = _agreed({"attention_bias": found.attention_bias, "bias": bias}, place) or False
    return ModelConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        head_dim=head_dim,
        layers=(LayerShape(heads, kv_heads, found.intermediate_size),) * found.num_hidden_layers,
        rms_norm_eps=found.rms_norm_eps,
        rope=_rope(found, head_dim, place),
        context_length=_context_length(found, place),
        tie_word_embeddings=bool(found.tie_word_embeddings),
        qkv_bias=biases or kind == "qwen2",
        output_bias=biases and kind != "qwen2",
        gate_up_bias=bool(found.mlp_bias),
        down_bias=bool(found.mlp_bias),
        qk_norm=kind == "qwen3",
    )


# What transformers assumes if a key is missing, where it differs from `_Raw`'s default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}

_Count = Annotated[int, Field(ge=1, le=1 << 20)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Raw(_Strict):
    """The keys of config.json that are used. The bounds are far above those of every published model."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model_type: str
    architectures: list[str] | None = None
    hidden_act: Literal["silu", "swish"] = "silu"  # two names of one function
    vocab_size: Annotated[int, Field(ge=1, le=1 << 23)]
    hidden_size: _Count
    intermediate_size: _Count
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
    rope_theta: _Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None  # checked where it is used, in `quasar.model.tokenizer`


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
    "chunk_size_feed_forward",
    "dtype",
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
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
"""Keys that change the function, with the values besides null at which they do not."""


def _require_understood(raw: dict[str, Any], place: str) -> None:
    """Refuse keys that change the function, and warn about keys that are on no list."""
    for key, value in raw.items():
        neutral = _REFUSED.get(key)
        if neutral is not None and value is not None and value not in neutral:
            raise RequestError(f"{place}: {key}={value} changes what the model computes and is not supported")
    known = {*_Raw.model_fields, *_HARMLESS, *_REFUSED, *QUANTIZATION_KEYS}
    for key in raw:
        if key not in known:
            warn_once(f"{place}: the key {key!r} is not known and has no effect here")


def _agreed(spellings: dict[str, Any], place: str) -> Any:
    """Return the value of a setting that has several spellings; None if none is used."""
    used = {key: value for key, value in spellings.items() if value is not None}
    if len({repr(value) for value in used.values()}) > 1:
        shown = ", ".join(f"{key}={value}" for key, value in used.items())
        raise RequestError(f"{place}: {shown} disagree, but they mean one setting; delete the wrong one")
    return next(iter(used.values()), None)


_One = Annotated[float, Field(ge=1, le=1)]


class _DefaultRope(_Strict):
    partial_rotary_factor: _One | None = None
    # Some configs of the default type have these, and transformers does not read them either.
    factor: _One | None = None
    original_max_position_embeddings: _Count | None = None


class _LinearRope(_DefaultRope):
    factor: _Positive


class _Llama3Rope(_DefaultRope):
    factor: _Positive
    low_freq_factor: _Positive
    high_freq_factor: _Positive
    original_max_position_embeddings: _Count

    @model_validator(mode="after")
    def _ordered(self) -> _Llama3Rope:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be less than high_freq_factor")
        return self


class _YarnRope(_DefaultRope):
    factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    attention_factor: _Positive | None = None
    mscale: Annotated[float, Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    truncate: bool | None = None
    finetuned: bool | None = None


class _LongRope(_DefaultRope):
    factor: _Positive | None = None
    short_factor: list[_Positive]
    long_factor: list[_Positive]
    attention_factor: _Positive | None = None
    original_max_position_embeddings: _Count


_ROPES: dict[str, type[_Strict]] = {
    "default": _DefaultRope,
    "linear": _LinearRope,
    "llama3": _Llama3Rope,
    "yarn": _YarnRope,
    "longrope": _LongRope,
}


def _rope(raw: _Raw, head_dim: int, place: str) -> RopeConfig:
    # transformers 5 writes rope_parameters. Earlier versions write rope_theta and, optionally, rope_scaling.
    spellings = {key: dict(getattr(raw, key) or {}) for key in ("rope_parameters", "rope_scaling")}
    names = sorted({name for settings in spellings.values() for name in settings} - {"rope_theta", "rope_type", "type"})
    thetas = {f"{key}.rope_theta": settings.get("rope_theta") for key, settings in spellings.items()}
    theta = _agreed({"rope_theta": raw.rope_theta, **thetas}, place)
    types = {f"{key}.{name}": of.get(name) for key, of in spellings.items() for name in ("rope_type", "type")}
    kind = _agreed(types, place) or "default"
    settings = {
        name: _agreed({f"{key}.{name}": of.get(name) for key, of in spellings.items()}, place) for name in names
    }
    if kind not in _ROPES:
        supported = ", ".join(_ROPES)
        raise RequestError(f"{place}: rope scaling {kind!r} is not supported; supported are {supported}")
    where = f"{place}: {next((key for key, of in spellings.items() if of), 'rope_parameters')}"
    theta = checked(_Theta, {"rope_theta": 10_000.0 if theta is None else theta}, where).rope_theta
    found = checked(_ROPES[kind], settings, where)
    if isinstance(found, _LongRope):
        return _longrope(found, theta, raw.max_position_embeddings, head_dim, where)
    if isinstance(found, _YarnRope):
        parameters = _yarn_parameters(found, raw.max_position_embeddings, where)
    else:
        parameters = found.model_dump(exclude_none=True, exclude={"partial_rotary_factor"})
    if kind == "default":
        parameters = {}
    return RopeConfig(theta, kind, {key: float(value) for key, value in parameters.items()})


class _Theta(_Strict):
    rope_theta: Annotated[float, Field(gt=1, le=1e12)]


def _yarn_parameters(found: _YarnRope, context_length: int, where: str) -> dict[str, float]:
    parameters = found.model_dump(
        exclude_none=True, exclude={"partial_rotary_factor", "mscale", "mscale_all_dim", "finetuned"}
    )
    original = parameters.setdefault("original_max_position_embeddings", context_length)
    factor = parameters.setdefault("factor", context_length / original)
    if found.attention_factor is None and found.mscale and found.mscale_all_dim:
        # As in transformers, which follows DeepSeek-V3.
        scales = [0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in (found.mscale, found.mscale_all_dim)]
        parameters["attention_factor"] = scales[0] / scales[1]
    return parameters


def _longrope(found: _LongRope, theta: float, context_length: int, head_dim: int, where: str) -> RopeConfig:
    """LongRoPE (Ding et al. 2024), whose frequencies must not depend on the length of the text."""
    if found.short_factor != found.long_factor:
        raise RequestError(
            f"{where}: rope scaling 'longrope' is supported only if short_factor equals long_factor, because otherwise "
            "the keys in the cache depend on the length of the text"
        )
    if len(found.short_factor) != head_dim // 2:
        raise RequestError(f"{where}: short_factor has {len(found.short_factor)} numbers, but needs {head_dim // 2}")
    factor = found.factor or context_length / found.original_max_position_embeddings
    scale = found.attention_factor
    if scale is None:
        growth = math.log(max(factor, 1.0)) / math.log(max(found.original_max_position_embeddings, 2))
        scale = math.sqrt(1.0 + growth)
    return RopeConfig(theta, "factors", {"attention_factor": scale}, tuple(found.short_factor))


def _context_length(raw: _Raw, place: str) -> int:
    length = raw.max_position_embeddings
    # The configs of Qwen2 and Qwen3 contain a window that is used only if use_sliding_window is true.
    used = raw.model_type == "mistral" if raw.use_sliding_window is None else raw.use_sliding_window
    if raw.layer_types is not None:
        if len(raw.layer_types) != raw.num_hidden_layers:
            raise RequestError(
                f"{place}: layer_types has {len(raw.layer_types)} entries, but num_hidden_layers is "
                f"{raw.num_hidden_layers}"
            )
        sliding = "sliding_attention" in raw.layer_types
        if sliding and (not used or raw.sliding_window is None):
            raise RequestError(
                f"{place}: layer_types has sliding_attention, but use_sliding_window={raw.use_sliding_window} and "
                f"sliding_window={raw.sliding_window}, which disagree"
            )
        used = used and (sliding or raw.model_type == "mistral")
    return min(length, raw.sliding_window) if used and raw.sliding_window else length
