"""W4 verification: 4-bit weights in groups; activations are in 16 bit, or in 8 bit with the same groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt, validate_call

from quasar.errors import RequestError
from quasar.model.kv_cache import KvBits
from quasar.model.transformer import Transformer
from quasar.quantization.mixed import candidates, choose, mean_bits
from quasar.quantization.recipes import Int4Format, awq_w4, gptq_w4, quantize_head, quantize_w4, require_groups
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
    bits: most bits per weight in the mean over all linear layers of the decoder blocks, with scales and zero points.
        The layers that gain most fidelity per byte have int8 weights, beside those of ``keep_8bit``, see
        `quasar.quantization.mixed`. None: no others
    lm_head_bits: 8 also quantizes the weights of the head, per output channel
    kv_bits: bits of the keys and values in the KV cache
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
        bits: Annotated[float, Field(gt=4, le=9)] | None = None,
        lm_head_bits: Literal[16, 8] = 16,
        kv_bits: KvBits = 16,
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
            "bits": bits,
            "lm_head_bits": lm_head_bits,
        }

        def quantize(model: Transformer) -> tuple[Transformer, Found]:
            everywhere = {PROJECTIONS[name] for name in keep_8bit}
            named = frozenset(f"blocks.{index}.{layer}" for index in range(len(model.blocks)) for layer in everywhere)
            form = Int4Format(group_size, symmetric, activation_bits, model.dtype, named)
            rotated = rotation == "hadamard"
            found: Found = {"in_8bit": None}
            if bits is not None:
                require_groups(model, form.group_size, "verifier.group_size")
                text = setup.calibration_for(f"verifier.bits={bits:g}")
                layers = candidates(model, form, rotated, text, setup.progress)
                form = replace(form, keep_8bit=choose(layers, bits, named))
                found = {"in_8bit": sorted(form.keep_8bit), "bits": mean_bits(layers, form.keep_8bit)}
            choice = f"verifier.method={method}"
            if method == "rtn":
                quantize_w4(model, form, clip, setup.progress, rotated)
            elif method == "awq":
                awq_w4(model, form, clip, setup.calibration_for(choice), setup.progress)
            else:
                gptq_w4(model, form, clip, setup.calibration_for(choice), setup.progress, rotated)
            if lm_head_bits == 8:
                quantize_head(model)
            return model, found

        model, found = prepared(model, setup, settings, quantize)
        self.in_8bit: tuple[str, ...] | None = None
        if found["in_8bit"] is not None:
            self.in_8bit = tuple(found["in_8bit"])
            self.details = (
                f"{found['bits']:.3f} bits per weight of the blocks' layers, scales included; in 8 bit: "
                f"{_listed(self.in_8bit)}",
            )
        super().__init__(model, setup, kv_bits=kv_bits)


def _listed(layers: Sequence[str]) -> str:
    """Return the layers by projection, such as "down_proj of blocks 0, 3; o_proj of block 2"."""
    parts = []
    for projection, layer in PROJECTIONS.items():
        blocks = sorted(int(name.split(".")[1]) for name in layers if name.endswith(layer))
        if blocks:
            parts.append(f"{projection} of block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}")
    return "; ".join(parts) or "none"
