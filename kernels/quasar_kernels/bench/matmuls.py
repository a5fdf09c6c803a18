"""Compares the matmuls with those of other libraries, for the matrices of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from quasar_kernels import reference
from quasar_kernels.bench.timing import alternating_medians, copies_of
from quasar_kernels.matmul import Matmul
from quasar_kernels.ops import MATMULS

# Outputs and inputs of the fused projections: QKV, output, gate and up, down, head.
MODELS = {
    "smollm2-135m": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
    "qwen3-0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],
    "qwen3-8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)],
}
# All of them except the head of the largest model, which takes gigabytes and minutes.
DEFAULT_SHAPES = "4096x4096,smollm2-135m,qwen3-0.6b,6144x4096,24576x4096,4096x12288"
GROUP_SIZE = 64
BASELINE = "torch bf16"

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to compute a matmul.

    prepare: returns the matmul with a weight, bfloat16 [N, K]
    bits: stored bits per weight, with its scales
    """

    name: str
    prepare: Callable[[Tensor], Multiply]
    bits: float


@dataclass(frozen=True)
class Measurement:
    """The measurement of one matmul; times are medians of many calls.

    bandwidth_fraction: bytes of the weights per second, as a fraction of the copy bandwidth of the run
    """

    backend: str
    outputs: int
    inputs: int
    rows: int
    milliseconds: float
    speedup: float
    bandwidth_fraction: float


def backends() -> list[Backend]:
    """Return the baseline, the matmuls of this package, and those of the installed libraries."""
    group_bits = 4 + 16 / GROUP_SIZE
    return [
        Backend(BASELINE, lambda weight: lambda x: F.linear(x, weight), 16),
        *(Backend(op.format, partial(_ours, op), op.bits(GROUP_SIZE)) for op in MATMULS),
        Backend("torch int8pack", _torch_int8, 8),
        Backend("torch int4pack", _torch_int4, group_bits + 16 / GROUP_SIZE),
        *_onednn(),
        *_bitsandbytes(),
    ]


@torch.inference_mode()
def measure(
    candidates: list[Backend], outputs: int, inputs: int, blocks: list[int], repetitions: int, bandwidth: float
) -> Iterator[Measurement]:
    """Time all backends on one matrix [outputs, inputs], for every number of rows."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    round_bytes = sum(outputs * inputs * backend.bits / 8 for backend in candidates)
    copies = copies_of(round_bytes)
    # Dense backends would share one tensor, but every copy needs its own.
    matmuls = [[backend.prepare(weight.clone()) for _ in range(copies)] for backend in candidates]
    for rows in blocks:
        x = torch.randn(rows, inputs, dtype=torch.bfloat16)
        medians = alternating_medians([[partial(one, x) for one in copied] for copied in matmuls], repetitions)
        for backend, median in zip(candidates, medians, strict=True):
            fraction = outputs * inputs * backend.bits / 8 / median / bandwidth
            yield Measurement(backend.name, outputs, inputs, rows, median * 1e3, medians[0] / median, fraction)


def _ours(op: Matmul, weight: Tensor) -> Multiply:
    packed = op.round(weight, GROUP_SIZE)
    return lambda x: op(x, packed)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(1) / reference.INT8_MAX
    return torch.round(weight.float() / scales.unsqueeze(1)).to(torch.int8), scales


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    scales = groups.abs().amax(2) / 7
    values = torch.round(groups / scales.unsqueeze(2)) + 8
    return values.to(torch.uint8).view(weight.shape), scales


def _torch_int8(weight: Tensor) -> Multiply:
    values, scales = _int8(weight)
    scales = scales.to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, values, scales)


def _torch_int4(weight: Tensor) -> Multiply:
    values, scales = _int4(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, pairs)


def _onednn() -> list[Backend]:
    """Return oneDNN's W8A8 if it is correct; without VNNI it adds pairs of products in 16 bits, which overflow."""
    ones = torch.ones(64, 128, dtype=torch.bfloat16)
    right = torch.allclose(_onednn_w8a8(ones)(ones[:1]).float(), torch.tensor(128.0), rtol=0.02)
    return [Backend("onednn w8a8", _onednn_w8a8, 8)] if right else []


def _onednn_w8a8(weight: Tensor) -> Multiply:
    values, scales = _int8(weight)
    packed = torch.ops.onednn.qlinear_prepack(values, None)
    zeros = torch.zeros(len(scales), dtype=torch.int32)

    def matmul(x: Tensor) -> Tensor:
        tokens, token_scales = reference.quantize_tokens(x)
        # Without AMX only unsigned activations, here with zero point 128, have a fast kernel.
        tokens = (tokens.view(torch.uint8) ^ 128).contiguous()
        out = torch.ops.onednn.qlinear_pointwise(
            tokens, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (out * token_scales).to(x.dtype)

    return matmul


def _bitsandbytes() -> list[Backend]:
    try:
        import bitsandbytes
    except ImportError:
        return []
    layers: Any = bitsandbytes.nn

    def nf4(weight: Tensor) -> Multiply:
        options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": False}
        layer = layers.Linear4bit(*reversed(weight.shape), bias=False, device="meta", **options)
        layer.weight = layers.Params4bit(
            weight, requires_grad=False, blocksize=GROUP_SIZE, compress_statistics=False, quant_type="nf4"
        )
        return layer.to("cpu").eval()

    def int8(weight: Tensor) -> Multiply:
        layer = layers.Linear8bitLt(
            *reversed(weight.shape), bias=False, has_fp16_weights=False, threshold=0.0, device="meta"
        )
        layer.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu").eval()

    return [Backend("bitsandbytes nf4", nf4, 4 + 32 / GROUP_SIZE), Backend("bitsandbytes int8", int8, 8)]


def matrices_of(shapes: str) -> list[tuple[int, int]]:
    """Return the matrices that ``--shapes`` names. Raises typer.BadParameter for an unknown name."""
    names = list(MODELS) if shapes == "all" else shapes.split(",")
    found: list[tuple[int, int]] = []
    for name in names:
        if name in MODELS:
            found += MODELS[name]
            continue
        try:
            outputs, inputs = map(int, name.split("x"))
        except ValueError:
            choices = ", ".join(["all", *MODELS])
            raise typer.BadParameter(f"--shapes {name}: neither OUTPUTSxINPUTS nor one of {choices}") from None
        if outputs % 32 or inputs % GROUP_SIZE:
            raise typer.BadParameter(f"--shapes {name}: outputs must be a multiple of 32, inputs of {GROUP_SIZE}")
        found.append((outputs, inputs))
    return list(dict.fromkeys(found))
