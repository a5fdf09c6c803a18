"""Linear layers with low-bit weights, and putting them into a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernels
from kernels import Int4Weight, Int8Weight
from kernels.reference import pack_int4
from quasar.model.transformer import Transformer
from quasar.quantization.rounding import quantize_int4, quantize_int8


class W8A8Linear(nn.Module):
    """A linear layer with int8 weights and dynamic per-token int8 activations."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @staticmethod
    def from_linear(linear: nn.Linear) -> W8A8Linear:
        return W8A8Linear(quantize_int8(linear.weight), linear.bias)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear_w8a8(x, self.weight, self.bias)


class W4Linear(nn.Module):
    """A linear layer with group-wise 4-bit weights; activations stay as they are."""

    def __init__(self, weight: Int4Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @staticmethod
    def from_linear(linear: nn.Linear, group_size: int, symmetric: bool) -> W4Linear:
        values, scales, zeros = quantize_int4(linear.weight, group_size, symmetric)
        weight = Int4Weight.prepare(pack_int4(values), scales, zeros, symmetric, linear.weight.dtype)
        return W4Linear(weight, linear.bias)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear_w4a16(x, self.weight, self.bias)


def replace_linears(
    model: Transformer,
    replacement: Callable[[str, nn.Linear], nn.Module],
    progress: Callable[[int, int], None],
) -> None:
    """Replace every linear layer of the decoder blocks in place; ``replacement`` gets its name and the layer."""
    names = [name for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, nn.Linear)]
    for done, name in enumerate(names):
        progress(done, len(names))
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            model.set_submodule(name, replacement(name, linear))
    progress(len(names), len(names))


def _bias_bytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes
