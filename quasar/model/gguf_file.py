"""Reads GGUF files, also in several parts: their config, and their tensors by the names of Hugging Face."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quasar.errors import RequestError, first_line
from quasar.model.config_file import config_of
from quasar.model.gguf_metadata import Values, raw_config
from quasar.model.grid import TYPES_FILE
from quasar.model.tensor_names import source_shapes
from quasar.model.transformer import Transformer

ROPE_FACTORS = "rope_freqs.weight"
"""The divisor of every frequency of the rotary embedding, with which Llama 3.1 files store their scaling."""
LONG = 1000
"""Longer arrays belong to the vocabulary and are not read."""

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


# The name of the norm before the MLP is that of the norm after attention in models that have the latter.
_WITH_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def parts_of(path: Path) -> list[Path]:
    """Return the files of a model, whose first one is ``path``: NAME-00001-of-0000N.gguf and those that follow.

    Raises RequestError if ``path`` is another part, or if a part is missing.
    """
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})", path.stem)
    if match is None:
        return [path]
    name, number, count = match[1], int(match[2]), int(match[3])
    parts = [path.with_name(f"{name}-{part:05d}-of-{count:05d}{path.suffix}") for part in range(1, count + 1)]
    if number != 1:
        raise RequestError(f"{path}: is part {number} of {count}; pass the first part, {parts[0].name}")
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise RequestError(f"{missing[0]}: no such file; it is one of the {count} parts of the model in {path}")
    return parts


class GGUFFile:
    """A model in a GGUF file, which is mapped into memory, or in several parts, of which ``path`` is the first.

    metadata: the metadata of the first part, see `quasar.model.gguf_metadata.Values`
    raw:      its config as in config.json of transformers
    config:   the same as a ModelConfig
    shapes:   of its tensors, by their Hugging Face names

    Raises RequestError if a file is corrupt or a part is missing, if the architecture is not supported, or if the
    tensors are not exactly those that the metadata implies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self._tensors = _read_parts(parts_of(path))
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise RequestError(f"{path}: tensor token_embd.weight is missing; the file is incomplete")
        self.metadata.setdefault(f"{self.metadata.get('general.architecture')}.vocab_size", int(embedding.shape[1]))
        factors = self._tensors.get(ROPE_FACTORS)
        divisors = None if factors is None else self._dequantized(factors).flatten().tolist()
        self.raw = raw_config(self.metadata, self._tensors, divisors, str(path))
        self.config = config_of(self.raw, str(path))
        # Only files of this architecture store the rows of q and k in the order of ggml's rotary embedding.
        self._interleaved = self.raw["model_type"] == "llama"
        with torch.device("meta"):
            self.shapes = source_shapes(Transformer(self.config))
        self._require_exact()

    def tensor(self, name: str) -> Any:  # gguf's reader is untyped
        """Return gguf's description of a tensor, which has its data and type."""
        return self._tensors[self._gguf_name(name)]

    @property
    def tensors(self) -> Iterable[Any]:
        """gguf's descriptions of all tensors of the file."""
        return self._tensors.values()

    def dense(self, name: str) -> Tensor:
        """Return a tensor in float32; it is dequantized if it is stored quantized."""
        values = self.in_order(name, self._dequantized(self.tensor(name)))
        # Files have the factors of norms, also where a checkpoint has the factors minus 1.
        return values - 1.0 if self.config.norms_one_plus and name.endswith("norm.weight") else values

    def in_order(self, name: str, rows: Tensor) -> Tensor:
        """Reorder the rows or biases of q and k, [heads * D, ...], for the rotary embedding of Hugging Face.

        ggml rotates the pairs (0, 1), (2, 3), …; Hugging Face rotates the pairs (0, D / 2), (1, D / 2 + 1), ….
        """
        if not self._interleaved or not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
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

    def _require_exact(self) -> None:
        expected = {self._gguf_name(name): shape for name, shape in self.shapes.items()}
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

    def _gguf_name(self, name: str) -> str:
        owner, _, kind = name.rpartition(".")
        if owner in _TOP:
            return f"{_TOP[owner]}.{kind}"
        index, _, rest = owner.removeprefix("model.layers.").partition(".")
        own = _WITH_POST_NORMS if self.config.post_norms else {}
        return f"blk.{index}.{own.get(rest) or _IN_BLOCK[rest]}.{kind}"


def write_dequantized(file: GGUFFile, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write a model as safetensors in bfloat16, with the config.json that transformers and this program read.

    A third file tells `quasar.model.grid` how many weights were quantized.
    """
    import json

    from safetensors.torch import save_file

    tensors = {}
    types: Counter[str] = Counter()
    for done, name in enumerate(file.shapes):
        progress(done, len(file.shapes))
        tensors[name] = file.dense(name).to(torch.bfloat16).contiguous()
        if len(file.shapes[name]) == 2:
            types[file.tensor(name).tensor_type.name] += tensors[name].numel()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / TYPES_FILE).write_text(json.dumps(types), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**file.raw, "dtype": "bfloat16"}, indent=2), encoding="utf-8")


def _read_parts(paths: list[Path]) -> tuple[Values, dict[str, Any]]:
    """Return the metadata of the first part, and gguf's descriptions of the tensors of all parts, by name."""
    from gguf import GGUFReader

    metadata: Values = {}
    tensors: dict[str, Any] = {}
    for number, path in enumerate(paths):
        try:
            reader = GGUFReader(path)
            own = {name: _value(field) for name, field in reader.fields.items()}
            found = {tensor.name: tensor for tensor in reader.tensors}
        # The reader checks nothing: a damaged file makes it read or allocate at random places.
        except (ValueError, OSError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
            raise RequestError(f"{path}: not a readable GGUF file ({error}); download it again") from None
        place = own.get("split.no") or 0, own.get("split.count") or 1
        if place != (number, len(paths)):
            raise RequestError(
                f"{path}: is part {place[0] + 1} of {place[1]} by its metadata, but part {number + 1} of {len(paths)} "
                "by its name; pass the first part, and keep the names NAME-00001-of-0000N.gguf of the parts"
            )
        if twice := sorted(found.keys() & tensors.keys()):
            raise RequestError(f"{path}: tensor {twice[0]} is in another part too; download the parts again")
        metadata, tensors = metadata or own, {**tensors, **found}
    expected = metadata.get("split.tensors.count")
    if len(paths) > 1 and expected not in (None, len(tensors)):
        raise RequestError(f"{paths[0]}: the parts have {len(tensors)} tensors instead of {expected}")
    return metadata, tensors


def _value(field: Any) -> Any:
    """Return the value of a metadata field as a Python object: a list for an array of numbers, None for any other."""
    from gguf import GGUFValueType

    if field.types[:1] == [GGUFValueType.ARRAY] and (
        field.types[1:] == [GGUFValueType.STRING] or len(field.data) > LONG
    ):
        return None
    value = field.contents()
    return value.item() if isinstance(value, np.generic) else value
