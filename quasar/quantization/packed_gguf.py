"""Reads quantized GGUF files. The formats Q8_0, Q4_0 and Q4_1 of ggml have groups of 32 inputs, called blocks there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quasar.errors import RequestError
from quasar.model.config import ModelConfig
from quasar.quantization.packed_rows import PackedRows

BLOCK = 32
KEPT_PACKED = ("Q8_0", "Q4_0", "Q4_1")
# Types that are stored as floats.
_FLOATS = ("F32", "F16", "BF16")

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


class GGUFCheckpoint:
    """Implements `PackedCheckpoint` for one GGUF file, which is mapped into memory.

    Raises RequestError if the file is corrupt or its architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader
        from transformers import AutoConfig

        self.path = path
        try:
            reader = GGUFReader(path)
            raw = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise RequestError(f"{path}: not a readable GGUF file of a supported architecture ({error})") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        raw["tie_word_embeddings"] = "output.weight" not in self._tensors
        self.config = ModelConfig.from_json(raw, str(path))
        # Only files of this architecture store the rows of q and k in the order of ggml's rotary embedding.
        self._interleaved = str(reader.fields["general.architecture"].contents()) == "llama"

    def __contains__(self, name: str) -> bool:
        return _gguf_name(name) in self._tensors

    def dense(self, name: str) -> Tensor:
        from gguf import quants

        tensor = self._tensor(name)
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise RequestError(f"{self.path}: tensor {tensor.name}: {error}") from None
        dense = torch.from_numpy(np.array(values, dtype=np.float32))
        return self._in_order(name, dense)

    def packed(self, name: str) -> PackedRows | None:
        tensor = self._tensor(name)
        kind = tensor.tensor_type.name
        if kind in _FLOATS:
            return None
        if kind not in KEPT_PACKED:
            raise RequestError(
                f"{self.path}: tensor {tensor.name} is {kind}; only {', '.join(KEPT_PACKED)} can stay quantized. "
                f"Pass model=path model.path={self.path} to dequantize the file"
            )
        rows = int(tensor.shape[1])
        blocks = torch.from_numpy(np.array(tensor.data, dtype=np.uint8)).view(rows, int(tensor.shape[0]) // BLOCK, -1)
        found = _int8(blocks) if kind == "Q8_0" else _int4(blocks, offset=kind == "Q4_1")
        values, scales, zeros = (self._in_order(name, part) for part in (found.values, found.scales, found.zeros))
        return PackedRows(found.bits, values, scales, zeros, found.symmetric)

    def _tensor(self, name: str) -> Any:  # gguf's reader is untyped
        stored = _gguf_name(name)
        if stored not in self._tensors:
            raise RequestError(f"{self.path}: tensor {stored} is missing; the file is incomplete")
        return self._tensors[stored]

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Reorder the rows of q and k, [heads * D, ...], for the rotary embedding of Hugging Face.

        ggml rotates the pairs (0, 1), (2, 3), …; Hugging Face rotates the pairs (0, D / 2), (1, D / 2 + 1), ….
        """
        if not self._interleaved or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return rows
        shape = self.config.layers[0]
        heads = shape.num_heads if "q_proj" in name else shape.num_kv_heads
        return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    owner, _, kind = name.rpartition(".")
    if owner in _TOP:
        return f"{_TOP[owner]}.{kind}"
    index, _, rest = owner.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_IN_BLOCK[rest]}.{kind}"


def _int8(blocks: Tensor) -> PackedRows:
    """Read Q8_0. blocks: uint8 [N, K / 32, 34], each with a float16 scale and 32 int8 values."""
    scales = _halves(blocks, 0)
    values = blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1)
    return PackedRows(8, values, scales, torch.zeros_like(scales), symmetric=True)


def _int4(blocks: Tensor, offset: bool) -> PackedRows:
    """Read Q4_0, or Q4_1 with ``offset``.

    blocks: uint8 [N, K / 32, 18 or 20], each with a float16 scale, a float16 minimum if ``offset``, and 16 bytes.
        Byte j contains element j in its low half and element j + 16 in its high half
    """
    scales = _halves(blocks, 0)
    data = blocks[:, :, 4 if offset else 2 :]
    values = torch.cat([data & 0xF, data >> 4], dim=2).flatten(1)
    if not offset:
        return PackedRows(4, values, scales, torch.full_like(scales, 8), symmetric=True)
    minimum = _halves(blocks, 1)
    # ``q * scale + minimum`` equals ``(q - zero) * scale`` with ``zero = -minimum / scale``. A constant group has scale
    # 0, so another scale is chosen for it.
    constant = scales == 0
    scales = torch.where(constant, minimum.abs().clamp(min=1e-12), scales)
    values = values.view(*scales.shape, BLOCK).masked_fill(constant.unsqueeze(2), 0).flatten(1)
    return PackedRows(4, values, scales, -minimum / scales, symmetric=False)


def _halves(blocks: Tensor, index: int) -> Tensor:
    """Return the float16 number with this index in every block, as float32 [N, K / 32]."""
    return blocks[:, :, 2 * index : 2 * index + 2].contiguous().view(torch.float16).squeeze(2).float()
