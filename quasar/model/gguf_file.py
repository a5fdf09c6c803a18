"""Reads GGUF files: metadata, which becomes a config as in config.json, and tensors by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from quasar.errors import RequestError, first_line
from quasar.model.config_file import config_of
from quasar.model.json_files import checked, warn_once
from quasar.model.tensor_names import source_shapes
from quasar.model.transformer import Transformer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"
"""The divisor of every frequency of the rotary embedding, with which Llama 3.1 files store their scaling."""

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFFile:
    """A model in one GGUF file, which is mapped into memory.

    raw:    its config as in config.json of transformers
    config: the same as a ModelConfig
    shapes: of its tensors, by their Hugging Face names

    Raises RequestError if the file is corrupt or only a part of a model, if its architecture is not supported, or if
    its tensors are not exactly those that the metadata implies.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
            metadata = {name: _value(field) for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        # The reader checks nothing: a damaged file makes it read or allocate at random places.
        except (ValueError, OSError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
            raise RequestError(f"{path}: not a readable GGUF file ({error}); download it again") from None
        self.raw = self._config(metadata)
        self.config = config_of(self.raw, str(path))
        # Only files of this architecture store the rows of q and k in the order of ggml's rotary embedding.
        self._interleaved = self.raw["model_type"] == "llama"
        with torch.device("meta"):
            self.shapes = source_shapes(Transformer(self.config))
        self._require_exact()

    def tensor(self, name: str) -> Any:  # gguf's reader is untyped
        """Return gguf's description of a tensor, which has its data and type."""
        return self._tensors[_gguf_name(name)]

    @property
    def tensors(self) -> Iterable[Any]:
        """gguf's descriptions of all tensors of the file."""
        return self._tensors.values()

    def dense(self, name: str) -> Tensor:
        """Return a tensor in float32; it is dequantized if it is stored quantized."""
        return self.in_order(name, self._dequantized(self.tensor(name)))

    def in_order(self, name: str, rows: Tensor) -> Tensor:
        """Reorder the rows of q and k, [heads * D, ...], for the rotary embedding of Hugging Face.

        ggml rotates the pairs (0, 1), (2, 3), …; Hugging Face rotates the pairs (0, D / 2), (1, D / 2 + 1), ….
        """
        if not self._interleaved or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return rows
        shape = self.config.layers[0]
        heads = shape.num_heads if "q_proj" in name else shape.num_kv_heads
        return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def _dequantized(self, tensor: Any) -> Tensor:
        from gguf import quants

        kind = tensor.tensor_type.name
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                values = quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise RequestError(
                f"{self.path}: tensor {tensor.name} is {kind}, which cannot be dequantized ({first_line(error)}); "
                "convert the file with `llama-quantize --allow-requantize FILE NEW_FILE Q8_0`, or pass another one"
            ) from None
        found = torch.from_numpy(np.array(values, dtype=np.float32))
        if not found.isfinite().all():
            raise RequestError(
                f"{self.path}: tensor {tensor.name} has values that are NaN or infinite; download the file again"
            )
        return found

    def _config(self, metadata: dict[str, Any]) -> dict[str, Any]:
        parts = metadata.get("split.count") or 1
        if parts != 1 or (metadata.get("split.no") or 0) != 0:
            raise RequestError(
                f"{self.path}: is one of {parts} parts of a split model; join them with `llama-gguf-split --merge "
                "FIRST_PART WHOLE_FILE` and pass the whole file"
            )
        architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
        if architecture not in ARCHITECTURES or kind != "model":
            supported = ", ".join(ARCHITECTURES)
            raise RequestError(
                f"{self.path}: not a readable GGUF file of a supported architecture (general.architecture is "
                f"{architecture!r}, general.type is {kind!r}; supported are models of {supported})"
            )
        own = {
            name.removeprefix(f"{architecture}."): value
            for name, value in metadata.items()
            if name.startswith(f"{architecture}.")
        }
        found = checked(_Metadata, own, f"{self.path}: metadata of {architecture}")
        for name in found.model_extra or {}:
            if name.startswith("rope."):
                raise RequestError(
                    f"{self.path}: {architecture}.{name} changes the rotary embedding and is not supported"
                )
            warn_once(f"{self.path}: the metadata {architecture}.{name} is not known and has no effect here")
        head_dim = found.key_length or found.hidden_size // found.heads
        for name, size in (
            ("rope.dimension_count", found.dimension_count),
            ("attention.value_length", found.value_length),
        ):
            if size not in (None, head_dim):
                raise RequestError(f"{self.path}: {architecture}.{name}={size} differs from the head size {head_dim}")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise RequestError(f"{self.path}: tensor token_embd.weight is missing; the file is incomplete")
        return {
            "architectures": [ARCHITECTURES[architecture]],
            "model_type": architecture,
            "hidden_act": "silu",
            "vocab_size": found.vocab_size or int(embedding.shape[1]),
            "hidden_size": found.hidden_size,
            "intermediate_size": found.intermediate_size,
            "num_hidden_layers": found.blocks,
            "num_attention_heads": found.heads,
            "num_key_value_heads": found.kv_heads or found.heads,
            "head_dim": head_dim,
            "max_position_embeddings": found.context_length,
            "rms_norm_eps": found.epsilon,
            "rope_parameters": self._rope(found, architecture),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        }

    def _rope(self, found: _Metadata, architecture: str) -> dict[str, Any]:
        """Return rope_parameters as transformers names them.

        ``rope_freqs.weight`` becomes the type longrope with equal factors for texts of every length, which divides the
        frequencies in the same way. The scaling types linear and yarn of ggml are those of transformers.
        """
        base = {"rope_theta": found.freq_base or 10_000.0}
        place = f"{self.path}: {architecture}.rope.scaling"
        if found.factor and found.scale_linear and found.factor != found.scale_linear:
            raise RequestError(f"{place}.factor and rope.scale_linear disagree")
        # 0 stands for no scaling, and a factor without a type is linear, as in llama.cpp.
        factor = found.factor or found.scale_linear or 1.0
        kind = found.scaling_type or "linear"
        if kind == "none":
            factor = 1.0
        growth = found.attention_factor or 1.0
        if growth != 1.0 and kind != "yarn":
            raise RequestError(f"{place}.attn_factor={growth} is not supported with {place}.type={kind}")
        scaled = kind == "yarn" or factor != 1.0
        if ROPE_FACTORS in self._tensors:
            factors = self._dequantized(self._tensors[ROPE_FACTORS]).flatten().tolist()
            if any(one != 1.0 for one in factors):
                if scaled:
                    raise RequestError(
                        f"{self.path}: {ROPE_FACTORS} together with {place}.type={kind} is not supported"
                    )
                return {
                    **base,
                    "rope_type": "longrope",
                    "short_factor": factors,
                    "long_factor": factors,
                    "factor": 1.0,
                    "attention_factor": 1.0,
                    "original_max_position_embeddings": found.context_length,
                }
        if not scaled:
            return {**base, "rope_type": "default"}
        if kind == "linear":
            return {**base, "rope_type": "linear", "factor": factor}
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": found.original_context_length or found.context_length,
            "attention_factor": growth * (0.1 * float(np.log(max(factor, 1.0))) + 1.0),
            "beta_fast": found.beta_fast or 32.0,
            "beta_slow": found.beta_slow or 1.0,
        }
        return {**base, **yarn}

    def _require_exact(self) -> None:
        expected = {_gguf_name(name): shape for name, shape in self.shapes.items()}
        missing = sorted(set(expected) - set(self._tensors))
        if missing:
            raise RequestError(
                f"{self.path}: tensor {missing[0]} is missing; the file is incomplete (it lacks {len(missing)} tensors)"
            )
        extra = sorted(set(self._tensors) - set(expected) - {ROPE_FACTORS})
        if extra:
            raise RequestError(
                f"{self.path}: contains tensor {extra[0]}, which the metadata does not imply (one of {len(extra)})"
            )
        for name, shape in expected.items():
            if (found := tuple(int(size) for size in reversed(self._tensors[name].shape))) != shape:
                raise RequestError(f"{self.path}: {name} has shape {found}, but the metadata implies {shape}")


_Count = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    epsilon: Annotated[_Number, Field(alias="attention.layer_norm_rms_epsilon")]
    vocab_size: _Count | None = None
    dimension_count: Annotated[_Count | None, Field(alias="rope.dimension_count")] = None
    freq_base: Annotated[_Number | None, Field(alias="rope.freq_base")] = None
    scale_linear: Annotated[_Number | None, Field(alias="rope.scale_linear")] = None
    scaling_type: Annotated[Literal["none", "linear", "yarn"] | None, Field(alias="rope.scaling.type")] = None
    factor: Annotated[_Number | None, Field(alias="rope.scaling.factor")] = None
    attention_factor: Annotated[_Number | None, Field(alias="rope.scaling.attn_factor")] = None
    original_context_length: Annotated[_Count | None, Field(alias="rope.scaling.original_context_length")] = None
    finetuned: Annotated[bool | None, Field(alias="rope.scaling.finetuned")] = None  # says nothing about the function
    beta_fast: Annotated[_Number | None, Field(alias="rope.scaling.yarn_beta_fast")] = None
    beta_slow: Annotated[_Number | None, Field(alias="rope.scaling.yarn_beta_slow")] = None
    expert_count: Literal[0] | None = None
    expert_used_count: Literal[0] | None = None
    sliding_window: Annotated[Literal[0] | None, Field(alias="attention.sliding_window")] = None
    causal: Annotated[Literal[True] | None, Field(alias="attention.causal")] = None
    parallel_residual: Annotated[Literal[False] | None, Field(alias="use_parallel_residual")] = None
    clamp: Annotated[_Number | None, Field(alias="attention.clamp_kqv", le=0)] = None
    logit_scale: Annotated[_Number | None, Field(ge=1, le=1)] = None
    embedding_scale: Annotated[_Number | None, Field(ge=1, le=1)] = None
    residual_scale: Annotated[_Number | None, Field(ge=1, le=1)] = None
    attn_softcap: Annotated[_Number | None, Field(alias="attn_logit_softcapping", le=0)] = None
    final_softcap: Annotated[_Number | None, Field(alias="final_logit_softcapping", le=0)] = None


def write_dequantized(file: GGUFFile, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write a model as safetensors in bfloat16, with the config.json that transformers and this program read."""
    import json

    from safetensors.torch import save_file

    tensors = {}
    for done, name in enumerate(file.shapes):
        progress(done, len(file.shapes))
        tensors[name] = file.dense(name).to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**file.raw, "dtype": "bfloat16"}, indent=2), encoding="utf-8")


def _gguf_name(name: str) -> str:
    owner, _, kind = name.rpartition(".")
    if owner in _TOP:
        return f"{_TOP[owner]}.{kind}"
    index, _, rest = owner.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_IN_BLOCK[rest]}.{kind}"


def _value(field: Any) -> Any:
    """Return the value of a metadata field as a Python object; of an array only its length, because none is used."""
    from gguf import GGUFValueType

    if field.types and field.types[0] == GGUFValueType.ARRAY:
        return [None] * len(field.data)
    value = field.contents()
    return value.item() if isinstance(value, np.generic) else value
