"""Every kernel against float64 arithmetic, with fresh random inputs and outputs that begin as poison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from quasar_kernels import reference
from quasar_kernels.triton import ops
from quasar_kernels.triton.int4_packing import W4A8_GROUP_SIZES, pack_int4
from torch import Tensor

from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json, Recorder
from scripts.gpu_suite.workers import in_processes

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest difference, in units of a row's largest value."""
INTERPRETER_TOLERANCE = 2**-5
SHARE_OF_TIME = 0.3
"""Of the suite's; a kernel that hangs must leave time for the others."""


@dataclass(frozen=True)
class Weights:
    """A product to check: N, K, and in which forms."""

    outputs: int
    inputs: int
    bias: bool
    group_sizes: tuple[int, ...]
    symmetric: tuple[bool, ...]


@dataclass(frozen=True)
class Job:
    """What one process checks at a time. weights: of products; None: everything else"""

    plan: Plan
    seed: int
    dtype: torch.dtype
    rows: tuple[int, ...] = ()
    weights: Weights | None = None


TINY = (Weights(48, 192, True, (32, 64), (True, False)), Weights(40, 384, False, (64, 128), (True,)))
FULL = (
    Weights(1000, 1024, True, (32, 64, 128), (True, False)),
    Weights(4096, 4096, False, (128,), (True,)),
    Weights(960, 576, True, (32, 64), (True, False)),
    Weights(4096, 12288, True, (64, 128), (False,)),
    Weights(24576, 4096, False, (128,), (True,)),
)
"""Ragged N; then the shapes of the models. The first two are checked in float16 too."""


def measure(plan: Plan, recorder: Recorder) -> Json:
    """All cases with their errors; ``correct`` where an error is within the tolerance of the dtype."""
    seed = torch.seed() % 2**31
    found: Json = {"seed": seed, "cases": [], "wrong": 0}
    limit = SHARE_OF_TIME * recorder.seconds_left()
    for cases in in_processes(_check, _jobs(plan, seed), _failed, plan.device, seconds=limit):
        found["cases"] += cases
        found["wrong"] += sum(not case["correct"] for case in cases)
        recorder.keep("correctness", found)
    return found


def _jobs(plan: Plan, seed: int) -> list[Job]:
    sizes = [(1, 6), (17,)] if plan.tiny else [(1, 2, 3, 5, 6, 8, 13, 16), (17, 32), (33, 64)]
    jobs = []
    for dtype in TOLERANCE:
        shapes = TINY if plan.tiny else FULL[: 2 if dtype == torch.float16 else None]
        jobs += [Job(plan, seed, dtype, rows, weights) for weights in shapes for rows in sizes]
        jobs.append(Job(plan, seed, dtype))
    return jobs


def _check(job: Job) -> list[Json]:
    torch.manual_seed(job.seed)
    with poisoned_memory():
        if job.weights is not None:
            return list(_products(job))
        return [*_elementwise(job.plan, job.dtype), *_attention(job.plan, job.dtype)]


def _failed(job: Job, error: Exception) -> list[Json]:
    """A kernel that does not compile or crashes its process must not hide the others."""
    reason = f"{type(error).__name__}: {str(error)[:500]}"
    return [{"op": str(job.weights or "element-wise"), "dtype": str(job.dtype), "correct": False, "error": reason}]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialized tensors hold NaN or 99 meanwhile, so that an element that a kernel leaves out is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out: Tensor = empty(*size, **options)
        return out.fill_(torch.nan if out.is_floating_point() else 99)

    torch.empty = poisoned  # type: ignore[assignment]
    torch.empty_like = lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like  # type: ignore[assignment]


def _products(job: Job) -> Iterator[Json]:
    plan, weights, dtype = job.plan, job.weights, job.dtype
    assert weights is not None
    for count in job.rows:
        x = _normal(plan, count, weights.inputs, dtype=dtype)
        for op, group_size, actual, expected in _calls(plan, x, weights):
            facts = {"rows": count, "outputs": weights.outputs, "inputs": weights.inputs, "group_size": group_size}
            try:
                yield _case(plan, op, dtype, _error(actual(), expected()), **facts)
            except Exception as error:  # the other ops may still be right
                reason = f"{type(error).__name__}: {str(error)[:500]}"
                yield {"op": op, "dtype": str(dtype), **facts, "correct": False, "error": reason}


def _calls(
    plan: Plan, x: Tensor, weights: Weights
) -> Iterator[tuple[str, int | None, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Op, group size, the kernel's result and the one of float64 arithmetic."""
    outputs, inputs = weights.outputs, weights.inputs
    bias = _normal(plan, outputs, dtype=x.dtype) if weights.bias else None
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=plan.device)
    scales = torch.rand(outputs, device=plan.device) + 0.1
    dense = _normal(plan, outputs, inputs, dtype=x.dtype)
    added = 0 if bias is None else bias.double()
    tokens, token_scales = reference.quantize_tokens(x)
    yield (
        "linear_w8a8",
        None,
        lambda: ops.linear_w8a8(x, values, scales, bias),
        lambda: (tokens.double() @ values.double().T) * (token_scales.double() * scales.double()) + added,
    )
    yield (
        "linear_w8a16",
        None,
        lambda: ops.linear_w8a16(x, values, scales, bias),
        lambda: (x.double() @ values.double().T) * scales.double() + added,
    )
    yield "linear_bf16", None, lambda: ops.linear_bf16(x, dense, bias), lambda: x.double() @ dense.double().T + added
    for group_size in weights.group_sizes:
        for symmetric in weights.symmetric:
            groups = (outputs, inputs // group_size)
            packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=plan.device)
            unit = ((torch.rand(groups, device=plan.device) + 0.1) / 64).half().float()
            zeros = torch.full(groups, 8.0, device=plan.device)
            if not symmetric:
                zeros = torch.randint(0, 16, groups, device=plan.device).float()
            weight = pack_int4(packed, unit, zeros)
            wide = reference.dequantize_int4(packed, unit, zeros).double()
            yield (
                "linear_w4a16",
                group_size,
                lambda w=weight: ops.linear_w4a16(x, w, bias),
                lambda w=wide: x.double() @ w.T + added,
            )  # type: ignore[misc]
            if group_size in W4A8_GROUP_SIZES:
                yield (
                    "linear_w4a8",
                    group_size,
                    lambda w=weight: ops.linear_w4a8(x, w, bias),  # type: ignore[misc]
                    lambda w=wide, size=group_size: _restored(x, size) @ w.T + added,  # type: ignore[misc]
                )


def _restored(x: Tensor, group_size: int) -> Tensor:
    """What quantization by group leaves of x, float64."""
    values, scales = reference.quantize_tokens(x, group_size)
    return (values.double().view(*scales.shape, group_size) * scales.double().unsqueeze(2)).view(x.shape)


def _elementwise(plan: Plan, dtype: torch.dtype) -> Iterator[Json]:
    for count, width in ((1, 64), (5, 96)) if plan.tiny else ((1, 576), (6, 4096), (17, 12288), (64, 1000)):
        x, residual, weight = (_normal(plan, count, width, dtype=dtype) for _ in range(3))
        wide = (x.double() + residual.double()).to(dtype).double()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight[0].double()
        out, total = ops.add_rms_norm(x, weight[0], 1e-6, residual)
        yield _case(plan, "add_rms_norm", dtype, _error(out, normalized), rows=count, width=width)
        yield _case(plan, "add_rms_norm sum", dtype, _error(total, wide), rows=count, width=width)
        tokens, scales, _ = ops.add_rms_norm_quantize(x, weight[0], 1e-6, residual)
        error = _error(tokens.double() * scales, normalized) - 0.5 / 127
        yield _case(plan, "add_rms_norm_quantize", dtype, error, rows=count, width=width)
        product = torch.nn.functional.silu(x.double()) * residual.double()
        gate_up = torch.cat([x, residual], dim=1)
        yield _case(plan, "silu_mul", dtype, _error(ops.silu_mul(gate_up), product), rows=count, width=width)
        tokens, scales = ops.silu_mul_quantize(gate_up)
        error = _error(tokens.double() * scales, product) - 0.5 / 127
        yield _case(plan, "silu_mul_quantize", dtype, error, rows=count, width=width)
        for group_size in (None, 8):
            pairs = zip(ops.quantize_tokens(x, group_size), reference.quantize_tokens(x, group_size), strict=True)
            same = all(torch.equal(*pair) for pair in pairs)
            facts = {"rows": count, "width": width, "group_size": group_size}
            yield _case(plan, "quantize_tokens", dtype, 0.0 if same else 1.0, **facts)


def _attention(plan: Plan, dtype: torch.dtype) -> Iterator[Json]:
    heads = [(4, 2, 32)] if plan.tiny else [(9, 3, 64), (16, 8, 128), (32, 8, 128)]
    for num_heads, kv_heads, head_dim in heads:
        for count in (1, 6) if plan.tiny else (1, 2, 6, 8, 16, 33, 64):
            for context in (0, 70) if plan.tiny else (0, 1, 63, 512, 2049, 8192):
                yield from _attention_case(plan, dtype, (num_heads, kv_heads, head_dim), count, context)


def _attention_case(
    plan: Plan, dtype: torch.dtype, heads: tuple[int, int, int], count: int, context: int
) -> Iterator[Json]:
    num_heads, kv_heads, head_dim = heads
    start = torch.tensor([context], device=plan.device)
    cache = _normal(plan, 2, kv_heads, context + count + 9, head_dim, dtype=dtype)
    wanted = cache.double()
    qkv = _normal(plan, count, (num_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(count, head_dim // 2, device=plan.device) * 6.28
    cos, sin = (torch.cat([part, part], dim=1) for part in (angles.cos(), angles.sin()))
    norms = [_normal(plan, head_dim, dtype=dtype) for _ in range(2)]
    wide = [tensor.double() for tensor in (qkv, cos, sin, *norms)]
    q = ops.rotary_write_at(qkv, cos, sin, cache[0], cache[1], start, norms[0], norms[1], 1e-6)
    expected = _rotated(wide, wanted, context, kv_heads)
    mask = torch.rand(count, count, device=plan.device) > 0.5
    mask.fill_diagonal_(True)
    facts = {"rows": count, "context": context, "heads": heads}
    yield _case(plan, "rotary_write_at q", dtype, _error(q, expected), **facts)
    yield _case(plan, "rotary_write_at cache", dtype, _error(cache, wanted), **facts)
    exact = reference.block_attention(q.double(), cache[0].double(), cache[1].double(), start, mask)
    yield _case(
        plan, "block_attention", dtype, _error(ops.block_attention(q, cache[0], cache[1], start, mask), exact), **facts
    )


def _rotated(wide: list[Tensor], cache: Tensor, context: int, kv_heads: int) -> Tensor:
    """Queries in float64; keys and values go to ``cache``."""
    qkv, cos, sin, q_norm, k_norm = wide
    heads = qkv.view(len(qkv), -1, cos.shape[1])
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)

    cache[0, :, context : context + len(qkv)] = turned(k, k_norm).transpose(0, 1)
    cache[1, :, context : context + len(qkv)] = v.transpose(0, 1)
    return turned(q, q_norm)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value of a row; infinite where a value is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    return float(((actual.double() - expected.double()).abs() / scale).max())


def _case(plan: Plan, op: str, dtype: torch.dtype, error: float, **facts: Any) -> Json:
    # Norms and rotations round two or three times on the way.
    tolerance = TOLERANCE[dtype] * (1 if op.startswith("linear") else 3)
    if plan.device.type == "cpu":
        tolerance = max(tolerance, INTERPRETER_TOLERANCE)
    error = error if error == error and error != float("inf") else 1e30
    return {"op": op, "dtype": str(dtype), **facts, "error": error, "correct": error <= tolerance}


def _normal(plan: Plan, *size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, device=plan.device).to(dtype)
