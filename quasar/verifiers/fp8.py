"""FP8 verification: E4M3 weights per output channel, and E4M3 activations per token."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, validate_call

from quasar.model.kv_cache import KvBits
from quasar.model.transformer import Transformer
from quasar.quantization.recipes import quantize_head, rtn_fp8
from quasar.verifiers._prepared import Found, prepared
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class Fp8Verifier(TransformerVerifier):
    """FP8 for all linear layers of the decoder blocks, with dynamic scales: needs no calibration.

    lm_head_bits: 8 also quantizes the weights of the head, to int8 per output channel, but not its inputs
    kv_bits: bits of the keys and values in the KV cache
    """

    label = "FP8 model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self, model: Transformer, setup: Setup, *, lm_head_bits: Literal[16, 8] = 16, kv_bits: KvBits = 16
    ) -> None:
        def quantize(model: Transformer) -> tuple[Transformer, Found]:
            rtn_fp8(model, setup.progress)
            if lm_head_bits == 8:
                quantize_head(model)
            return model, {}

        model, _ = prepared(model, setup, {"fp8": "rtn", "lm_head_bits": lm_head_bits}, quantize)
        super().__init__(model, setup, kv_bits=kv_bits)
