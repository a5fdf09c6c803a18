"""One matmul in every form that can compute it: these kernels and those of other libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from quasar_kernels import Quantized
from quasar_kernels.matmul import Matmul
from quasar_kernels.ops import MATMULS, linear_w8a8
from torch import Tensor

from scripts.gpu_suite.plan import Product

TINYGEMM_K_TILES = 8
INT_MM_ROWS = 32
"""Smallest number of rows of `torch._int_mm`. Smaller blocks are padded."""


@dataclass(frozen=True)
class Contender:
    """A backend with one copy of a weight. nbytes: bytes of the weight; run: computes the matmul on rows."""

    name: str
    nbytes: int
    run: Callable[[Tensor], Tensor]


Build = Callable[[], Contender]


def builders(product: Product, device: torch.device) -> Iterator[tuple[str, Build]]:
    """Return name and constructor of every contender that runs on this machine. A constructor makes a new copy."""
    n, k = product.outputs, product.inputs
    yield "cublas_bf16", lambda: _cublas(n, k, device)
    for op in MATMULS:
        yield op.name, partial(_ours, op, product, device)
    if device.type == "cuda":
        yield "torch_int_mm", lambda: _int_mm(n, k, device)
        yield "torch_int4pack", lambda: _torch_int4pack(n, k, product.group_size, device)
    if device.type == "cuda" and importlib.util.find_spec("torchao"):
        yield "torchao_int4", lambda: _torchao(n, k, product.group_size, device)
    if device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
        yield "bitsandbytes_int8", lambda: _bitsandbytes_int8(n, k, device)
        yield "bitsandbytes_nf4", lambda: _bitsandbytes_nf4(n, k, device)


def _cublas(n: int, k: int, device: torch.device) -> Contender:
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    return Contender("cublas_bf16", weight.nbytes, lambda x: F.linear(x, weight))


def _ours(op: Matmul, product: Product, device: torch.device) -> Contender:
    """Return the op of this package. Activations are quantized outside of the timed part, as a model fuses this."""
    assert op.triton is not None
    values = torch.randn(product.outputs, product.inputs, device=device, dtype=torch.bfloat16)
    weight, run = op.round(values, product.group_size), op.triton.run
    return Contender(op.name, weight.nbytes, lambda x: run(_quantized(op, x, product.group_size), weight))


def _int_mm(n: int, k: int, device: torch.device) -> Contender:
    """The matmul without scales. Its time is a lower bound for W8A8 with PyTorch's own operations."""
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)

    def run(x: Tensor) -> Tensor:
        tokens = _quantized(linear_w8a8.OP, x, 0).values
        if len(tokens) < INT_MM_ROWS:
            tokens = F.pad(tokens, (0, 0, 0, INT_MM_ROWS - len(tokens)))
        return torch._int_mm(tokens, values.T)

    return Contender("torch_int_mm", values.nbytes, run)


def _torch_int4pack(n: int, k: int, group_size: int, device: torch.device) -> Contender:
    """gpt-fast's 4-bit matmul, which PyTorch contains."""
    values = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(values, TINYGEMM_K_TILES)
    scales_and_zeros = torch.full((k // group_size, n, 2), 0.01, dtype=torch.bfloat16, device=device)

    def run(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, group_size, scales_and_zeros)

    return Contender("torch_int4pack", values.nbytes + scales_and_zeros.nbytes, run)


def _torchao(n: int, k: int, group_size: int, device: torch.device) -> Contender:
    """Return torchao's matmul with 4-bit weights in the layout for tensor cores."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    quantize_(layer, Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d"))
    return Contender("torchao_int4", n * k // 2 + n * k // group_size * 4, layer)


def _bitsandbytes_int8(n: int, k: int, device: torch.device) -> Contender:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False).to(device)
    return Contender("bitsandbytes_int8", n * k + 4 * n, lambda x: layer(x.half()))


def _bitsandbytes_nf4(n: int, k: int, device: torch.device) -> Contender:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(device)
    return Contender("bitsandbytes_nf4", n * k // 2 + n * k // 16, lambda x: layer(x))


_last_quantized: tuple[Tensor, Matmul, int, Tensor | Quantized] | None = None


def _quantized(op: Matmul, x: Tensor, group_size: int) -> Any:
    """Return the rows in the form that an op takes. They are computed once, outside of the timed part."""
    global _last_quantized
    if _last_quantized is None or _last_quantized[0] is not x or _last_quantized[1:3] != (op, group_size):
        _last_quantized = x, op, group_size, op.quantized(x, group_size)
    return _last_quantized[3]
