"""The products as `torch.library` operators, so that compiled graphs contain them as single nodes.

Eager calls do not come this way: the dispatcher costs more than a small product itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quasar_kernels.cpu.library import Library, Product, backend, multiply
from quasar_kernels.cpu.packing import BLOCK_OUTPUTS, PackedWeight


def _library() -> Library:
    library = backend()
    if library is None:
        raise RuntimeError("a graph with CPU kernels was run where they cannot be compiled")
    return library


def _meta(x: Tensor, values: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0] * BLOCK_OUTPUTS))


@torch.library.custom_op("quasar::linear_w8a8", mutates_args=())
def linear_w8a8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(_library().linear_w8a8, PackedWeight(values, x.shape[1], scales), x, bias)


@linear_w8a8.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _meta(x, values)


@torch.library.custom_op("quasar::linear_w8a16", mutates_args=())
def linear_w8a16(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(_library().linear_w8a16, PackedWeight(values, x.shape[1], scales), x, bias)


@linear_w8a16.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _meta(x, values)


@torch.library.custom_op("quasar::linear_bf16", mutates_args=())
def linear_bf16(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    product = _library().linear_f32 if values.shape[1] == x.shape[1] else _library().linear_bf16
    return multiply(product, PackedWeight(values, x.shape[1]), x, bias)


@linear_bf16.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return _meta(x, values)


@torch.library.custom_op("quasar::linear_w4a8", mutates_args=())
def linear_w4a8(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, scale_unit: float, bias: Tensor | None
) -> Tensor:
    return _multiply_int4(_library().linear_w4a8, x, values, scales, zeros, scale_unit, bias)


@linear_w4a8.register_fake
def _(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, scale_unit: float, bias: Tensor | None
) -> Tensor:
    return _meta(x, values)


@torch.library.custom_op("quasar::linear_w4a16", mutates_args=())
def linear_w4a16(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, scale_unit: float, bias: Tensor | None
) -> Tensor:
    return _multiply_int4(_library().linear_w4a16, x, values, scales, zeros, scale_unit, bias)


@linear_w4a16.register_fake
def _(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, scale_unit: float, bias: Tensor | None
) -> Tensor:
    return _meta(x, values)


def _multiply_int4(
    product: Product,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scale_unit: float,
    bias: Tensor | None,
) -> Tensor:
    group_size = x.shape[1] // scales.shape[1]
    return multiply(product, PackedWeight(values, x.shape[1], scales, zeros, group_size, scale_unit), x, bias)
