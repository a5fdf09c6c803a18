"""INT8 verification: int8 weights per output channel, and int8 activations per token and group."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, validate_call

from quasar.config.checks import ReadIf
from quasar.errors import RequestError
from quasar.model.kv_cache import KvBits
from quasar.model.transformer import Transformer
from quasar.quantization.recipes import Int8Format, gptq_w8, quantize_head, rtn_w8, smoothquant_w8a8
from quasar.verifiers._prepared import Found, prepared
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class Int8Verifier(TransformerVerifier):
    """Int8 weights for all linear layers of the decoder blocks.

    method: smoothquant (Xiao et al. 2023), gptq (Frantar et al. 2023) or rtn (round to nearest)
    alpha: smoothing strength in 0 to 1; auto searches it for every layer
    activation_bits: 8 quantizes the inputs too, when they are known
    activation_group: number of inputs of a token that share a scale; None if all of them do
    lm_head_bits: 8 also quantizes the weights of the head, but not its inputs
    alphas: the smoothing strength of every layer, by name; empty for the other methods
    kv_bits: bits of the keys and values in the KV cache

    Raises RequestError if an option has no effect with the others, or if the group size does not fit the model.
    """

    label = "INT8 model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        method: Literal["smoothquant", "gptq", "rtn"] = "smoothquant",
        alpha: Annotated[
            Annotated[float, Field(ge=0, le=1)] | Literal["auto"], ReadIf("method", ("smoothquant",))
        ] = "auto",
        activation_bits: Literal[16, 8] = 8,
        activation_group: Annotated[Annotated[int, Field(ge=16)] | None, ReadIf("activation_bits", (8,))] = 64,
        lm_head_bits: Literal[16, 8] = 16,
        kv_bits: KvBits = 16,
    ) -> None:
        if activation_bits == 16:
            if method == "smoothquant":
                raise RequestError(
                    "verifier.method=smoothquant makes activations easier to quantize, but verifier.activation_bits=16 "
                    "does not quantize them; choose method=rtn or method=gptq"
                )
            activation_group = None
        form = Int8Format(activation_bits, activation_group)
        settings = {
            "int8": method,
            "alpha": alpha,
            "activation_bits": activation_bits,
            "activation_group": activation_group,
            "lm_head_bits": lm_head_bits,
        }

        def quantize(model: Transformer) -> tuple[Transformer, Found]:
            alphas: dict[str, float] = {}
            if method == "rtn":
                rtn_w8(model, form, setup.progress)
            else:
                calibration = setup.calibration_for(f"verifier.method={method}")
                if method == "gptq":
                    gptq_w8(model, form, calibration, setup.progress)
                else:
                    strength = None if alpha == "auto" else alpha
                    alphas = smoothquant_w8a8(model, form, strength, calibration, setup.progress)
            if lm_head_bits == 8:
                quantize_head(model)
            return model, {"alphas": alphas}

        model, found = prepared(model, setup, settings, quantize)
        self.alphas: dict[str, float] = found["alphas"]
        if self.alphas:
            smoothed = [strength for strength in self.alphas.values() if strength] or [0.0]
            self.details = (f"{len(smoothed)} of {len(self.alphas)} layers smoothed, mean alpha {fmean(smoothed):.2f}",)
        super().__init__(model, setup, kv_bits=kv_bits)
