"""The fused ops between the products, over the layers of real models, against PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar_kernels import block_ops, reference
from quasar_kernels.bench.timing import alternating_medians, copies_of

Call = Callable[[], object]
EPS = 1e-6


@dataclass(frozen=True)
class Layer:
    """Sizes of a decoder layer; head_norms: whether queries and keys are normalized (Qwen3)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool


LAYERS = {
    "smollm2-135m": Layer(576, 1536, 9, 3, 64, False),
    "qwen3-0.6b": Layer(1024, 3072, 16, 8, 128, True),
    "qwen3-8b": Layer(4096, 12288, 32, 8, 128, True),
}
CONTEXTS = (512, 4096)


@dataclass(frozen=True)
class FusedMeasurement:
    """Medians of many calls; torch_milliseconds: of PyTorch's operations for the same, in the same run.

    context: cached tokens that attention reads, None for the other ops
    bandwidth_fraction: of the bytes that must be read and written, against the copy bandwidth of the run
    """

    op: str
    model: str
    context: int | None
    rows: int
    milliseconds: float
    torch_milliseconds: float
    speedup: float
    bandwidth_fraction: float


@dataclass(frozen=True)
class Contest:
    """An op on one copy of its data: ours, PyTorch's, and the bytes that it has to move."""

    ours: Call
    torch: Call
    moved_bytes: int


@torch.inference_mode()
def measure_fused(model: str, blocks: list[int], repetitions: int, bandwidth: float) -> Iterator[FusedMeasurement]:
    """Time all ops of one model's layer, for every number of rows."""
    layer = LAYERS[model]
    ops: dict[str, Callable[[Layer, int], Contest]] = {
        "rms_norm": _norm,
        "rms_norm_quantize": _norm_quantize,
        "silu_mul": _silu,
        "silu_mul_quantize": _silu_quantize,
        "rotary_write": _rotary,
    }
    for rows in blocks:
        for op, contest in ops.items():
            yield _measure(op, model, None, rows, partial(contest, layer, rows), repetitions, bandwidth)
        for context in CONTEXTS:
            contest = partial(_attention, layer, rows, context)
            yield _measure("block_attention", model, context, rows, contest, repetitions, bandwidth)


def _measure(
    op: str,
    model: str,
    context: int | None,
    rows: int,
    contest: Callable[[], Contest],
    repetitions: int,
    bandwidth: float,
) -> FusedMeasurement:
    first = contest()
    # What an activation-sized op reads was just written in a real pass, and so is cached; a KV cache is not.
    copies = copies_of(2 * first.moved_bytes) if context is not None else 1
    contests = [first, *(contest() for _ in range(copies - 1))]
    ours, theirs = alternating_medians([[one.ours for one in contests], [one.torch for one in contests]], repetitions)
    fraction = first.moved_bytes / ours / bandwidth
    return FusedMeasurement(op, model, context, rows, ours * 1e3, theirs * 1e3, theirs / ours, fraction)


def _norm(layer: Layer, rows: int) -> Contest:
    x, residual, weight = _random(rows, layer.hidden), _random(rows, layer.hidden), _random(layer.hidden)

    def by_torch() -> Tensor:
        return F.rms_norm(x + residual, (layer.hidden,), weight, EPS)

    return Contest(lambda: block_ops.add_rms_norm(x, weight, EPS, residual), by_torch, 4 * x.nbytes + weight.nbytes)


def _norm_quantize(layer: Layer, rows: int) -> Contest:
    x, residual, weight = _random(rows, layer.hidden), _random(rows, layer.hidden), _random(layer.hidden)

    def by_torch() -> object:
        return reference.quantize_tokens(F.rms_norm(x + residual, (layer.hidden,), weight, EPS))

    def ours() -> object:
        return block_ops.add_rms_norm_quantize(x, weight, EPS, residual)

    return Contest(ours, by_torch, 3 * x.nbytes + x.numel() + weight.nbytes)


def _silu(layer: Layer, rows: int) -> Contest:
    gate_up = _random(rows, 2 * layer.intermediate)

    def by_torch() -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    return Contest(lambda: block_ops.silu_mul(gate_up), by_torch, gate_up.nbytes * 3 // 2)


def _silu_quantize(layer: Layer, rows: int) -> Contest:
    gate_up = _random(rows, 2 * layer.intermediate)

    def by_torch() -> object:
        gate, up = gate_up.chunk(2, dim=1)
        return reference.quantize_tokens(F.silu(gate) * up)

    return Contest(lambda: block_ops.silu_mul_quantize(gate_up), by_torch, gate_up.nbytes * 5 // 4)


def _rotary(layer: Layer, rows: int) -> Contest:
    qkv = _random(rows, (layer.heads + 2 * layer.kv_heads) * layer.head_dim)
    keys, values = (_random(layer.kv_heads, 2 * rows, layer.head_dim) for _ in range(2))
    angles = torch.rand(rows, layer.head_dim)
    norms = (_random(layer.head_dim), _random(layer.head_dim)) if layer.head_norms else (None, None)
    arguments = (qkv, angles.cos(), angles.sin(), keys, values, torch.tensor([rows]), *norms, EPS)
    moved_bytes = 2 * qkv.nbytes + 2 * angles.nbytes
    return Contest(
        lambda: block_ops.rotary_write_at(*arguments), lambda: reference.rotary_write_at(*arguments), moved_bytes
    )


def _attention(layer: Layer, rows: int, context: int) -> Contest:
    keys, values = (_random(layer.kv_heads, context + rows, layer.head_dim) for _ in range(2))
    q = _random(rows, layer.heads, layer.head_dim)
    start, causal = torch.tensor([context]), torch.ones(rows, rows, dtype=torch.bool).tril()
    visible = F.pad(causal, (context, 0), value=True)

    def by_torch() -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=visible, enable_gqa=True
        )

    moved_bytes = keys.nbytes + values.nbytes + 2 * q.nbytes
    return Contest(lambda: block_ops.block_attention(q, keys, values, start, causal), by_torch, moved_bytes)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)
