"""W4 verification: 4-bit weights in groups; activations are in 16 bit, or in 8 bit with the same groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict, PositiveInt, validate_call

from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.quantization.recipes import Int4Format, awq_w4, gptq_w4, quantize_head, quantize_w4
from quasar.verifiers._prepared import Found, prepared
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier

PROJECTIONS = {
    "qkv_proj": "attention.qkv",
    "o_proj": "attention.output",
    "gate_up_proj": "mlp.gate_up",
    "down_proj": "mlp.down",
}
"""The layers of a decoder block, by the names that checkpoints give them."""


class Int4Verifier(TransformerVerifier):
    """4-bit weights in groups along the input dimension, for all linear layers of the decoder blocks.

    method: gptq (Frantar et al. 2023), awq (Lin et al. 2024) or rtn (round to nearest)
    group_size: weights per group
    symmetric: whether there are no zero points
    clip: whether the range of each group is chosen by a search
    activation_bits: 8 also quantizes the inputs of these layers
    rotation: hadamard spreads outliers over all channels first (QuaRot, Ashkboos et al. 2024)
    keep_8bit: the layers of every block that have int8 weights, one scale per output channel, instead
    lm_head_bits: 8 also quantizes the weights of the head, per output channel
    """

    label = "INT4 model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        method: Literal["gptq", "awq", "rtn"] = "gptq",
        group_size: PositiveInt = 64,
        symmetric: bool = True,
        clip: bool = True,
        activation_bits: Literal[16, 8] = 16,
        rotation: Literal["none", "hadamard"] = "none",
        keep_8bit: Sequence[Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]] = (),
        lm_head_bits: Literal[16, 8] = 16,
    ) -> None:
        if rotation != "none" and method == "awq":
            raise RequestError(
                "verifier.rotation=hadamard and verifier.method=awq both move outliers between channels; choose "
                "method=gptq or method=rtn, or rotation=none"
            )
        settings = {
            "int4": method,
            "group_size": group_size,
            "symmetric": symmetric,
            "clip": clip,
            "activation_bits": activation_bits,
            "rotation": rotation,
            "keep_8bit": sorted(keep_8bit),
            "lm_head_bits": lm_head_bits,
        }

        def quantize(model: Transformer) -> tuple[Transformer, Found]:
            in_8bit = tuple(PROJECTIONS[name] for name in keep_8bit)
            form = Int4Format(group_size, symmetric, activation_bits, model.dtype, in_8bit)
            rotated = rotation == "hadamard"
            choice = f"verifier.method={method}"
            if method == "rtn":
                quantize_w4(model, form, clip, setup.progress, rotated)
            elif method == "awq":
                awq_w4(model, form, clip, setup.calibration_for(choice), setup.progress)
            else:
                gptq_w4(model, form, clip, setup.calibration_for(choice), setup.progress, rotated)
            if lm_head_bits == 8:
                quantize_head(model)
            return model, {}

        model, _ = prepared(model, setup, settings, quantize)
        super().__init__(model, setup)
