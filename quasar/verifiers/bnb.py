"""Verifiers with the low-bit layers of bitsandbytes: LLM.int8() and the 4-bit formats NF4 and FP4.

They are widely used and need no calibration, so they are a baseline for the other formats. Their matmuls sum in an
order that depends on the number of rows (on a CPU they dequantize and call PyTorch's), so speculative output may differ
from autoregressive output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import ConfigDict, NonNegativeFloat, validate_call
from torch import nn

from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class BnbInt8Verifier(TransformerVerifier):
    """LLM.int8() (Dettmers et al. 2022): int8 weights per output channel, int8 activations per token.

    On a CPU bitsandbytes does not quantize the activations.

    threshold: input columns with a larger activation are multiplied in 16 bit. The columns are chosen over all rows of
        a pass, so that the logits of a token depend on the draft tokens in the same pass, and the output depends on the
        drafter. 0 turns this off, so outliers are quantized too
    """

    label = "INT8 model of bitsandbytes"
    rows_are_independent = False

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(self, model: Transformer, setup: Setup, *, threshold: NonNegativeFloat = 0.0) -> None:
        bnb = _bitsandbytes()

        def quantized(linear: nn.Linear) -> nn.Module:
            layer = bnb.nn.Linear8bitLt(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                has_fp16_weights=False,
                threshold=threshold,
                device="meta",
            )
            layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            return _finished(layer, linear, linear.weight.numel() + 4 * linear.out_features)

        _replace_linears(model, quantized, setup.progress)
        super().__init__(model, setup)


class Bnb4BitVerifier(TransformerVerifier):
    """4-bit weights in groups of consecutive weights, 16-bit activations (QLoRA, Dettmers et al. 2023).

    quant_type: nf4 (quantiles of a normal distribution) or fp4
    block_size: weights per group
    double_quant: whether the scales are quantized too, to 8 bit
    """

    label = "4-bit model of bitsandbytes"
    rows_are_independent = False

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        block_size: Literal[64, 128, 256, 512] = 64,
        double_quant: bool = False,
    ) -> None:
        bnb = _bitsandbytes()
        dtype = model.dtype

        def quantized(linear: nn.Linear) -> nn.Module:
            layer = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=double_quant,
                quant_type=quant_type,
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data.cpu(),
                requires_grad=False,
                blocksize=block_size,
                compress_statistics=double_quant,
                quant_type=quant_type,
            )
            scales = linear.weight.numel() // block_size
            scale_bytes = scales + 4 * -(-scales // 256) if double_quant else 4 * scales
            return _finished(layer, linear, linear.weight.numel() // 2 + scale_bytes)

        _replace_linears(model, quantized, setup.progress)
        super().__init__(model, setup)


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def _finished(layer: nn.Linear, linear: nn.Linear, weight_bytes: int) -> nn.Module:
    """Move a layer to its device, which makes bitsandbytes quantize it, and store its size in bytes.

    The size cannot be read from the parameters.
    """
    layer.bias = linear.bias
    layer = layer.to(linear.weight.device)
    setattr(layer, "weight_bytes", weight_bytes + (0 if linear.bias is None else linear.bias.nbytes))  # noqa: B010
    return layer


def _replace_linears(
    model: Transformer, replacement: Callable[[nn.Linear], nn.Module], progress: Callable[[int, int], None]
) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    del linears["lm_head"]
    for done, (name, linear) in enumerate(linears.items()):
        progress(done, len(linears))
        with torch.no_grad():
            model.set_submodule(name, replacement(linear))
    progress(len(linears), len(linears))
