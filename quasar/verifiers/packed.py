"""A verifier that loads a quantized checkpoint: GGUF, compressed-tensors, GPTQ, AWQ or LLM.int8()."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, validate_call

from quasar.errors import RequestError
from quasar.model.kv_cache import KvBits
from quasar.model.transformer import Transformer
from quasar.quantization.packed import load_packed, open_packed, storage
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class PackedVerifier(TransformerVerifier):
    """The checkpoint at ``path``. Its linear layers keep their stored weights; the run's model is the reference.

    path: a GGUF file, or the first of several parts, or a checkpoint folder
    activation_bits: 8 also quantizes the inputs of 4-bit layers
    kv_bits: bits of the keys and values in the KV cache
    """

    label = "quantized checkpoint"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        path: str | None = None,
        activation_bits: Literal[16, 8] = 16,
        kv_bits: KvBits = 16,
    ) -> None:
        if path is None:
            raise RequestError("verifier.path is not set; verifier=packed needs verifier.path=FOLDER_OR_GGUF_FILE")
        checkpoint = open_packed(Path(path).expanduser())
        if checkpoint.config.vocab_size != model.config.vocab_size:
            raise RequestError(
                f"verifier.path={path} has a vocabulary of {checkpoint.config.vocab_size} tokens, but the model has "
                f"{model.config.vocab_size}; both must be the same model"
            )
        packed = load_packed(checkpoint, model.dtype, model.device, activation_bits, setup.progress)
        super().__init__(packed, setup, kv_bits=kv_bits)
        self.details = storage(packed)
