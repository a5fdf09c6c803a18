"""W8A8 verification: int8 weights per output channel, int8 activations per token."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, validate_call

from quasar.model.transformer import Transformer
from quasar.quantization.recipes import quantize_head, quantize_w8a8, smoothquant_w8a8
from quasar.verifiers._prepared import Found, prepared
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class Int8Verifier(TransformerVerifier):
    """W8A8 for all linear layers of the decoder blocks.

    method: smoothquant (Xiao et al. 2023) or rtn (round to nearest)
    alpha: smoothing strength in 0 to 1; auto searches it for every layer
    lm_head_bits: 8 also quantizes the weights of the head, but not its inputs
    alphas: the smoothing strength of every layer, by name; empty for rtn
    """

    label = "INT8 model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        method: Literal["smoothquant", "rtn"] = "smoothquant",
        alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto",
        lm_head_bits: Literal[16, 8] = 16,
    ) -> None:
        settings = {"int8": method, "alpha": alpha, "lm_head_bits": lm_head_bits}

        def quantize(model: Transformer) -> tuple[Transformer, Found]:
            alphas: dict[str, float] = {}
            if method == "smoothquant":
                strength = None if alpha == "auto" else alpha
                calibration = setup.calibration_for("verifier.method=smoothquant")
                alphas = smoothquant_w8a8(model, strength, calibration, setup.progress)
            else:
                quantize_w8a8(model, setup.progress)
            if lm_head_bits == 8:
                quantize_head(model)
            return model, {"alphas": alphas}

        model, found = prepared(model, setup, settings, quantize)
        self.alphas: dict[str, float] = found["alphas"]
        if self.alphas:
            smoothed = [strength for strength in self.alphas.values() if strength] or [0.0]
            self.details = (f"{len(smoothed)} of {len(self.alphas)} layers smoothed, mean alpha {fmean(smoothed):.2f}",)
        super().__init__(model, setup)
