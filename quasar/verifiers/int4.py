"""W4 verification: group-wise 4-bit weights, activations in 16 bit."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, PositiveInt, validate_call
from torch import nn

from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.quantization.layers import W4Linear, replace_linears
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class Int4Verifier(TransformerVerifier):
    """Round-to-nearest 4-bit weights in groups along the input of all linear layers of the decoder blocks."""

    label = "INT4 model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        method: Literal["rtn"] = "rtn",
        group_size: PositiveInt = 64,
        symmetric: bool = True,
    ) -> None:
        def quantized(name: str, linear: nn.Linear) -> nn.Module:
            if linear.in_features % group_size:
                raise RequestError(_group_size_message(group_size, name, linear.in_features))
            return W4Linear.from_linear(linear, group_size, symmetric)

        replace_linears(model, quantized, setup.progress)
        super().__init__(model, setup)


def _group_size_message(group_size: int, name: str, width: int) -> str:
    divisors = [size for size in (16, 32, 64, 96, 128, 192, 256) if width % size == 0]
    return (
        f"verifier.group_size={group_size} does not divide {width}, the input width of {name}; "
        f"group sizes that do: {', '.join(map(str, divisors)) or 'none of the usual ones'}"
    )
