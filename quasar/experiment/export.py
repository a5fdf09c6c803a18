"""`quasar export`: writes a verifier's model as a Hugging Face folder that other programs load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from quasar.errors import RequestError, storage_error
from quasar.experiment.standalone import Standalone, build_alone
from quasar.model.config import QUANTIZATION_KEYS, LayerShape, ModelConfig
from quasar.model.config_file import config_of
from quasar.model.json_files import read_object
from quasar.model.linear import QuantizedLinear
from quasar.model.rope import head_order
from quasar.quantization.export import Exported, export_tensors
from quasar.results.console import Reporter
from quasar.verifiers.transformer import TransformerVerifier

COPIED = ("tokenizer*", "*.jinja", "generation_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that the model keeps from its checkpoint."""
VOCABULARY = ("vocab.json", "merges.txt")

_BIASES = ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")


def export_verifier(folder: Path, overrides: Sequence[str], reporter: Reporter) -> None:
    """Build the verifier that the overrides name, and write its model to ``folder``, which must not exist.

    Quantized layers are written in the formats of compressed-tensors, everything else in the dtype of the model.

    Raises RequestError if a standard config or these formats cannot express the model; the message names what.
    """
    if folder.exists():
        raise RequestError(f"{folder}: exists already; export to a new folder")
    built = build_alone("", overrides, lambda settings: (), reporter)
    if not isinstance(built.verifier, TransformerVerifier):
        raise RequestError(
            f"verifier={built.settings.verifier['name']} has no model of Quasar's, so it is not exported"
        )
    raw, config = _config(built, built.verifier)
    exported = export_tensors(built.verifier.model, config)
    if exported.quantization is not None:
        raw["quantization_config"] = exported.quantization
    try:
        _write(folder, raw, exported, built.checkpoint.folder)
    except OSError as error:
        raise storage_error(folder, error) from None
    reporter.line(f"exported {built.sentence()}")
    quantized = exported.quantization
    how = f"verifier=packed verifier.path={folder}" if quantized else f"model=path model.path={folder}"
    reporter.line(f"wrote {folder}: {quantized['format'] if quantized else 'not quantized'}; read it with {how}")
    for warning in _warnings(exported, built.verifier.cache.bits):
        reporter.warning(warning)


def _config(built: Standalone, verifier: TransformerVerifier) -> tuple[dict[str, Any], ModelConfig]:
    """Return the config.json of the model and what it means. Raises RequestError if it cannot express the model."""
    own = verifier.model.config
    if isinstance(verifier.model.lm_head, QuantizedLinear):
        own = replace(own, tie_word_embeddings=False)
    _require_alike(own.layers)
    if head_order(own.rope, own.head_dim) is not None:
        raise RequestError(
            f"the model rotates {own.rope.rotated(own.head_dim)} of {own.head_dim} elements of a head, which are in "
            "another order here than in a checkpoint; exporting such a model is not supported"
        )
    folder = built.checkpoint.folder
    raw = _llama(own) if folder is None else read_object(folder / "config.json")
    for key in (*QUANTIZATION_KEYS, "torch_dtype"):
        raw.pop(key, None)
    shape: LayerShape = own.layers[0]
    if isinstance(raw.get("layer_types"), list):
        windows = [layer.window is not None for layer in own.layers]
        raw["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    raw |= {
        "num_hidden_layers": own.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": own.head_dim,
        "intermediate_size": shape.intermediate_size,
        "tie_word_embeddings": own.tie_word_embeddings,
        "dtype": str(verifier.dtype).removeprefix("torch."),
    }
    _add_biases(raw, own)
    meant = config_of(raw)
    for key, value in asdict(own).items():
        found = asdict(meant)[key]
        if found != value and not (key in _BIASES and found):
            raise RequestError(
                f"model_type {raw['model_type']} cannot express {key}={value}, which the exported model needs"
                + ("; biases come from verifier.importance=flap, choose another one" if key in _BIASES else "")
            )
    return raw, meant


def _require_alike(layers: Sequence[LayerShape]) -> None:
    if len({(layer.num_heads, layer.num_kv_heads, layer.intermediate_size) for layer in layers}) > 1:
        widths = sorted({layer.intermediate_size for layer in layers})
        heads = sorted({layer.num_kv_heads for layer in layers})
        raise RequestError(
            f"the layers differ (MLP widths {widths}, KV heads {heads}), which the config of a Hugging Face model "
            "cannot express. Export verifier.method=depth, or verifier.uniform=true with a verifier.ratio at which the "
            "rounding of the widths leaves no difference"
        )


def _add_biases(raw: dict[str, Any], own: ModelConfig) -> None:
    """Set the flags of biases that the model has and the config does not, where transformers knows the flag."""
    if raw["model_type"] == "llama":
        raw["attention_bias"] = own.qkv_bias or own.output_bias
        raw["mlp_bias"] = own.gate_up_bias or own.down_bias
    elif raw["model_type"] == "qwen3":
        raw["attention_bias"] = own.qkv_bias or own.output_bias


def _llama(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a random model, without its layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
    }


def _write(folder: Path, raw: dict[str, Any], exported: Exported, source: Path | None) -> None:
    """Write the folder as a whole: if writing fails, there is none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(exported.tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for pattern in () if source is None else (*COPIED, *VOCABULARY):
            for file in source.glob(pattern) if source is not None else ():
                shutil.copyfile(file, unfinished / file.name)
        (unfinished / "model.safetensors").chmod(0o644)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _warnings(exported: Exported, kv_bits: int) -> list[str]:
    found = []
    if kv_bits != 16:
        found.append(f"verifier.kv_bits={kv_bits} is no part of a checkpoint; set it again where the checkpoint is run")
    if exported.quantization is None:
        return found
    groups = exported.quantization["config_groups"].values()
    inputs = [group["input_activations"] for group in groups if group["input_activations"] is not None]
    if any(entry["strategy"] == "group" for entry in inputs):
        found.append(
            "the inputs have a scale per token and group, which the format allows but few engines support; "
            "verifier.activation_group=null (int8) or verifier.activation_bits=16 (int4) exports what all support"
        )
    return found
