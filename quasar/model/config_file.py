"""Converts the config.json of a checkpoint to a ModelConfig."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from quasar.errors import RequestError
from quasar.model.config import SUPPORTED, LayerShape, ModelConfig, RopeConfig
from quasar.model.config_keys import Count, Positive, RawConfig, StrictKeys, read_keys
from quasar.model.families import family_options, uses_second_rope, windows_of
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
    found = read_keys(raw, kind, place)
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
    rope, second_rope = _ropes(found, head_dim, place)
    context_length = _context_length(found, rope)
    family = family_options(found, head_dim, place)
    second = uses_second_rope(found, place)
    windows = [None if window is None or window >= context_length else window for window in windows_of(found, place)]
    return ModelConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        head_dim=head_dim,
        layers=tuple(
            LayerShape(heads, kv_heads, found.intermediate_size, *own) for own in zip(windows, second, strict=True)
        ),
        rms_norm_eps=found.rms_norm_eps,
        rope=rope,
        second_rope=second_rope if any(second) else None,
        context_length=context_length,
        tie_word_embeddings=bool(found.tie_word_embeddings),
        qkv_bias=biases or kind == "qwen2",
        output_bias=biases and kind != "qwen2",
        gate_up_bias=bool(found.mlp_bias),
        down_bias=bool(found.mlp_bias),
        **family,
    )


_THETAS = {"smollm3": 2_000_000.0, "gemma3_text": 1_000_000.0}
"""The base of the rotary embedding if a config names none, where it is not 10,000."""


def _agreed(spellings: dict[str, Any], place: str) -> Any:
    """Return the value of a setting that has several spellings; None if none is used."""
    used = {key: value for key, value in spellings.items() if value is not None}
    if len({repr(value) for value in used.values()}) > 1:
        shown = ", ".join(f"{key}={value}" for key, value in used.items())
        raise RequestError(f"{place}: {shown} disagree, but they mean one setting; delete the wrong one")
    return next(iter(used.values()), None)


_One = Annotated[float, Field(ge=1, le=1)]


class _DefaultRope(StrictKeys):
    partial_rotary_factor: _One | None = None
    # Some configs of the default type have these, and transformers does not read them either.
    factor: _One | None = None
    original_max_position_embeddings: Count | None = None


class _LinearRope(_DefaultRope):
    factor: Positive


class _Llama3Rope(_DefaultRope):
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count

    @model_validator(mode="after")
    def _ordered(self) -> _Llama3Rope:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be less than high_freq_factor")
        return self


class _YarnRope(_DefaultRope):
    factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: Annotated[float, Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    truncate: bool | None = None
    finetuned: bool | None = None


class _LongRope(_DefaultRope):
    factor: Positive | None = None
    short_factor: list[Positive]
    long_factor: list[Positive]
    attention_factor: Positive | None = None
    original_max_position_embeddings: Count


_ROPES: dict[str, type[StrictKeys]] = {
    "default": _DefaultRope,
    "linear": _LinearRope,
    "llama3": _Llama3Rope,
    "yarn": _YarnRope,
    "longrope": _LongRope,
}


def _ropes(raw: RawConfig, head_dim: int, place: str) -> tuple[RopeConfig, RopeConfig | None]:
    """Return the rotary embedding, and the second one of the families that have two."""
    if raw.model_type == "smollm3":
        return _rope(raw, head_dim, place), RopeConfig(type="none")
    if raw.model_type != "gemma3_text":
        return _rope(raw, head_dim, place), None
    # transformers 5 writes one object for every type of layer.
    by_type = raw.rope_parameters or {}
    nested = {"full_attention", "sliding_attention"} & by_type.keys()
    if not nested:
        theta = 10_000.0 if raw.rope_local_base_freq is None else raw.rope_local_base_freq
        return _rope(raw, head_dim, place), RopeConfig(theta)
    if extra := sorted(by_type.keys() - {"full_attention", "sliding_attention"}):
        raise RequestError(f"{place}: rope_parameters.{extra[0]} beside those of layer types is not understood")
    full, sliding = (by_type.get(kind) for kind in ("full_attention", "sliding_attention"))
    alone = raw.model_copy(update={"rope_parameters": full, "rope_theta": None})
    local = {"rope_theta": raw.rope_local_base_freq or 10_000.0, **(sliding or {})}
    second = raw.model_copy(update={"rope_parameters": local, "rope_theta": None, "rope_scaling": None})
    return _rope(alone, head_dim, place), _rope(second, head_dim, place)


def _rope(raw: RawConfig, head_dim: int, place: str) -> RopeConfig:
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
    share = 1.0
    if raw.model_type == "phi3":
        spelled = {
            "partial_rotary_factor": raw.partial_rotary_factor,
            "rope": settings.pop("partial_rotary_factor", None),
        }
        share = checked(_Share, {"partial_rotary_factor": _agreed(spelled, place) or 1.0}, place).partial_rotary_factor
        if kind == "longrope":
            settings.setdefault("original_max_position_embeddings", raw.original_max_position_embeddings)
        head_dim = int(head_dim * share)
        if head_dim % 2:
            raise RequestError(f"{place}: partial_rotary_factor={share} rotates {head_dim} elements; it must be even")
    if kind not in _ROPES:
        supported = ", ".join(_ROPES)
        raise RequestError(f"{place}: rope scaling {kind!r} is not supported; supported are {supported}")
    where = f"{place}: {next((key for key, of in spellings.items() if of), 'rope_parameters')}"
    theta = checked(
        _Theta, {"rope_theta": _THETAS.get(raw.model_type, 10_000.0) if theta is None else theta}, where
    ).rope_theta
    found = checked(_ROPES[kind], settings, where)
    if isinstance(found, _LongRope):
        longrope = _longrope(found, theta, raw.max_position_embeddings, head_dim, where)
        return replace(longrope, share=share)
    if isinstance(found, _YarnRope):
        parameters = _yarn_parameters(found, raw.max_position_embeddings, where)
    else:
        parameters = found.model_dump(exclude_none=True, exclude={"partial_rotary_factor"})
    if kind == "default":
        parameters = {}
    return RopeConfig(theta, kind, {key: float(value) for key, value in parameters.items()}, share=share)


class _Share(StrictKeys):
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)]


class _Theta(StrictKeys):
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
    """LongRoPE (Ding et al. 2024), as far as the frequencies do not depend on the length of the text.

    Texts that are longer than the original context rotate by other factors, also at positions whose keys are in the
    cache already. If the factors differ, the context therefore ends with the original one.
    """
    for name in ("short_factor", "long_factor"):
        if len(factors := getattr(found, name)) != head_dim // 2:
            raise RequestError(f"{where}: {name} has {len(factors)} numbers, but needs {head_dim // 2}")
    original = found.original_max_position_embeddings
    limit = {} if found.short_factor == found.long_factor else {"context_length": float(original)}
    if limit and context_length > original:
        warn_once(
            f"{where}: the context ends after {original} tokens instead of {context_length}, because longer texts "
            "rotate by long_factor also at positions before it, whose keys are in the cache already"
        )
    factor = found.factor or context_length / found.original_max_position_embeddings
    scale = found.attention_factor
    if scale is None:
        growth = math.log(max(factor, 1.0)) / math.log(max(found.original_max_position_embeddings, 2))
        scale = math.sqrt(1.0 + growth)
    return RopeConfig(theta, "factors", {"attention_factor": scale, **limit}, tuple(found.short_factor))


def _context_length(raw: RawConfig, rope: RopeConfig) -> int:
    """Return the length of the longest sequence. YaRN extends the original one by its factor, as in vLLM."""
    if rope.type == "yarn":
        return int(rope.parameters["factor"] * rope.parameters["original_max_position_embeddings"])
    return min(raw.max_position_embeddings, int(rope.parameters.get("context_length", raw.max_position_embeddings)))
