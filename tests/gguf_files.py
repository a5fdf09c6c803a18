"""Writes GGUF files of small Llama models as llama.cpp does, with tensors of any type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor
from transformers import LlamaForCausalLM

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Where the float16 numbers are in a block of a type. Any other byte may have any value."""

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def is_linear(name: str) -> bool:
    return name.split(".")[-2] in LINEAR


def write_gguf(
    file: Path,
    dense: LlamaForCausalLM,
    kind: GGMLQuantizationType | Callable[[str], GGMLQuantizationType | None],
    add: Callable[[GGUFWriter], None] = lambda writer: None,
    leave_out: str = "nothing",
    architecture: str = "llama",
    tensors_per_part: int = 0,
) -> dict[str, Tensor]:
    """Write a file with quantized linear layers; return their dequantized weights by Hugging Face name.

    kind: the type of all of them, or of a matrix by its Hugging Face name, None for float32. A type for which gguf has
        no quantizer gets random blocks
    add: adds metadata and tensors; leave_out: the name of a tensor
    tensors_per_part: write several parts, whose names begin with that of ``file``
    """
    config = dense.config
    writer = GGUFWriter(file, architecture, split_max_tensors=tensors_per_part)
    add_shape(writer, config, context_length=512)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(10000.0)
    add(writer)
    back: dict[str, Tensor] = {}
    for name, weight in dense.state_dict().items():
        if gguf_name(name) == leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        chosen = (kind(name) if callable(kind) else kind if is_linear(name) else None) if weight.dim() == 2 else None
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        heads = heads if architecture == "llama" else None
        if chosen is None:
            writer.add_tensor(gguf_name(name), interleaved(weight.numpy(), heads))
            continue
        stored = blocks_of(weight.numpy(), chosen)
        writer.add_tensor(gguf_name(name), interleaved(stored, heads), raw_dtype=chosen)
        back[name] = torch.from_numpy(np.array(quants.dequantize(stored, chosen), dtype=np.float32))
    finish(writer)
    return back


def add_shape(writer: GGUFWriter, config: Any, context_length: int) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def blocks_of(weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return rows [N, K] quantized, or random rows of the same size if gguf cannot quantize to this type."""
    try:
        return quants.quantize(weight, kind)
    except NotImplementedError:
        return random_blocks(kind, weight.shape, np.random.default_rng(weight.shape[0] + weight.shape[1]))


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return rows of random bytes, uint8 [N, bytes], except for their float16 numbers, which are random too."""
    inputs, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0], shape[1] // inputs, size), dtype=np.uint8)
    for place in HALVES.get(kind.name, ()):
        numbers = random.standard_normal((*blocks.shape[:2], 1)) / (50 if inputs == 32 else 5000)
        blocks[:, :, place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def interleaved(rows: np.ndarray, heads: int | None) -> np.ndarray:
    """Order rows as llama.cpp, which rotates neighbours: it stores the two halves of every head alternating."""
    if heads is None:
        return rows
    half = rows.shape[0] // heads // 2
    return np.ascontiguousarray(rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape))
