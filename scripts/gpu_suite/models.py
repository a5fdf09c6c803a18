"""Builds randomly initialized models on the device, in every weight format."""

from __future__ import annotations

import torch
from quasar_kernels import Int4Weight, Int8Weight
from torch import nn

from quasar.model.config import ModelConfig
from quasar.model.linear import Linear
from quasar.model.rope import Ropes
from quasar.model.transformer import Transformer
from quasar.quantization.layers import W4Linear, W8A8Linear, W8A16Linear
from scripts.gpu_suite.plan import GROUP_SIZE, SMALL_GROUP_SIZE

FORMATS = ("bf16", "int8", "int4", "int4 head8")
"""Formats of the blocks' linear layers. The head is in 16 bit, except for the last one, where it is int8 per row."""


def random_model(config: ModelConfig, weights: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Build a model whose random weights have a scale that keeps activations finite. Its text is meaningless."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config)
    for name, module in list(model.named_modules()):
        in_blocks = name.startswith("blocks.")
        if isinstance(module, nn.Linear) and (in_blocks or name == "lm_head"):
            kind = weights.split()[0] if in_blocks else ("head8" if weights.endswith("head8") else "bf16")
            model.set_submodule(name, _linear(module, kind, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            filled = _filled(parameter.shape, device, dtype)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(filled, requires_grad=False))
    model.ropes = Ropes(config).to(device)
    return model.eval().requires_grad_(False)


def _linear(linear: nn.Linear, kind: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    outputs, inputs = linear.weight.shape
    bias = None if linear.bias is None else torch.zeros(outputs, dtype=dtype, device=device)
    if kind in ("int8", "head8"):
        values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        scales = torch.full((outputs,), inputs**-0.5 / 73, device=device)
        layer = W8A16Linear if kind == "head8" else W8A8Linear
        return layer(Int8Weight(values, scales), bias)
    if kind == "int4":
        group_size = GROUP_SIZE if inputs % GROUP_SIZE == 0 else SMALL_GROUP_SIZE
        return W4Linear(_random_int4(outputs, inputs, group_size, device), bias)
    dense = Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(_filled(linear.weight.shape, device, dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense


def _random_int4(outputs: int, inputs: int, group_size: int, device: torch.device) -> Int4Weight:
    """Return a symmetric weight that is already in the kernels' form, so that the GPU stores no other copy."""
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.full((outputs, inputs // group_size), 0.25 * inputs**-0.5, device=device)
    weight = Int4Weight(packed, scales, torch.full_like(scales, 8), symmetric=True)
    if device.type == "cuda":
        weight.packed_for_triton()
    return weight


def _filled(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, shape[1] ** -0.5)
