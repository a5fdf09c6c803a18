"""W8A8 verification: int8 weights per output channel, int8 activations per token."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, validate_call

from quasar.model.transformer import Transformer
from quasar.quantization.layers import W8A8Linear, replace_linears
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class Int8Verifier(TransformerVerifier):
    """Round-to-nearest W8A8 of all linear layers of the decoder blocks; embedding and lm_head stay in 16 bit."""

    label = "INT8 model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(self, model: Transformer, setup: Setup, *, method: Literal["rtn"] = "rtn") -> None:
        replace_linears(model, lambda name, linear: W8A8Linear.from_linear(linear), setup.progress)
        super().__init__(model, setup)
