"""Compares every Triton kernel with the op's definition in float64, on random inputs and poisoned outputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from quasar_kernels import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, QuantizedSlots, reference
from quasar_kernels.cases import LAYERS, Layer, Setting
from quasar_kernels.dispatch import LayerOp
from quasar_kernels.matmul import Matmul, Weight
from quasar_kernels.ops import LAYER_OPS, MATMULS
from quasar_kernels.triton.quantize import quantize_tokens
from torch import Tensor

from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json, Recorder
from scripts.gpu_suite.workers import in_processes

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest allowed difference, relative to the largest value of a row."""
INTERPRETER_TOLERANCE = 2**-5
SHARE_OF_TIME = 0.3
"""Share of the suite's time for this section, so that a kernel that hangs leaves time for the others."""


@dataclass(frozen=True)
class Weights:
    """A matmul to check: N, K, and the forms of the weight."""

    outputs: int
    inputs: int
    bias: bool
    group_sizes: tuple[int, ...]
    symmetric: tuple[bool, ...]


@dataclass(frozen=True)
class Job:
    """The part that one process checks. weights: the matmuls' weights; None for all other ops."""

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
"""Matmuls with an irregular N, then those of the models. The first two are also checked in float16."""
TINY_LAYERS = (Layer(64, 96, 4, 2, 32, True, 64),)
FULL_LAYERS = (Layer(1000, 1000, 12, 4, 40, False, 64), *LAYERS.values())
"""A layer with irregular sizes, then those of the models."""
QUANTIZATION_STEP = 1 / 127
"""Two quantizers may round a value between two steps to different steps."""


def measure(plan: Plan, recorder: Recorder) -> Json:
    """Return all cases with their errors. A case is ``correct`` if its error is within the tolerance of the dtype."""
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
            return list(_matmuls(job))
        return [*_layer_ops(job), *_quantization(job)]


def _failed(job: Job, error: Exception) -> list[Json]:
    """Return the failure of a part whose kernel does not compile or crashes its process."""
    reason = f"{type(error).__name__}: {str(error)[:500]}"
    return [
        {"op": str(job.weights or "between the matmuls"), "dtype": str(job.dtype), "correct": False, "error": reason}
    ]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized tensors with NaN or 99, so that an element that a kernel does not write is noticed."""
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


def _matmuls(job: Job) -> Iterator[Json]:
    plan, shape, dtype = job.plan, job.weights, job.dtype
    assert shape is not None
    bias = _normal(plan, shape.outputs, dtype=dtype) if shape.bias else None
    for count in job.rows:
        x = _normal(plan, count, shape.inputs, dtype=dtype)
        for op in MATMULS:
            for weight in _weights(plan, op, shape, dtype):
                assert op.triton is not None
                if not op.triton.supports(x, weight, bias):
                    continue
                facts = {"rows": count, "outputs": shape.outputs, "inputs": shape.inputs}
                facts["group_size"] = weight.group_size or None
                try:
                    expected = op.plain(x.double(), weight, None if bias is None else bias.double())
                    yield _case(plan, op.name, dtype, _error(op.triton.run(x, weight, bias), expected), **facts)
                except Exception as error:  # the other ops may still be right
                    reason = f"{type(error).__name__}: {str(error)[:500]}"
                    yield {"op": op.name, "dtype": str(dtype), **facts, "correct": False, "error": reason}


def _weights(plan: Plan, op: Matmul, shape: Weights, dtype: torch.dtype) -> Iterator[Weight]:
    """Yield random weights of an op's format."""
    size = shape.outputs, shape.inputs
    if op.weight_bits == 16:
        yield DenseWeight(_normal(plan, *size, dtype=dtype))
    elif op.activations == "fp8":
        yield Fp8Weight.rounded(_normal(plan, *size, dtype=dtype))
    elif op.weight_bits == 8:
        values = torch.randint(-127, 128, size, dtype=torch.int8, device=plan.device)
        yield Int8Weight(values, torch.rand(shape.outputs, device=plan.device) + 0.1)
    else:
        for group_size, symmetric in itertools.product(shape.group_sizes, shape.symmetric):
            groups = shape.outputs, shape.inputs // group_size
            packed = torch.randint(0, 256, (shape.outputs, shape.inputs // 2), dtype=torch.uint8, device=plan.device)
            scales = (torch.rand(groups, device=plan.device) + 0.1) / 64
            zeros = torch.full(groups, 8.0, device=plan.device)
            if not symmetric:
                zeros = torch.randint(0, 16, groups, device=plan.device).float()
            yield Int4Weight(packed, scales, zeros, symmetric)


def _layer_ops(job: Job) -> Iterator[Json]:
    plan = job.plan
    for layer in TINY_LAYERS if plan.tiny else FULL_LAYERS:
        for op in LAYER_OPS:
            for count in (1, 6) if plan.tiny else (1, 2, 6, 8, 16, 33, 64):
                for context in _contexts(plan) if op.reads_cache else _contexts(plan)[-1:]:
                    for group_size in (None, 8):
                        setting = Setting(layer, count, context, group_size, plan.device, job.dtype)
                        yield from _layer_op(plan, op, setting)


def _contexts(plan: Plan) -> tuple[int, ...]:
    return (0, 70) if plan.tiny else (0, 1, 63, 512, 2049, 8192)


def _layer_op(plan: Plan, op: LayerOp, setting: Setting) -> Iterator[Json]:
    """Return an op's results on the same values in float64, and the arguments that it may have written to."""
    arguments = op.case(setting).arguments
    if op.triton is None or not op.triton.supports(*arguments):
        return
    numbers = [argument for argument in arguments if isinstance(argument, int)]
    if setting.group_size is not None and setting.group_size not in numbers:
        return  # it does not quantize
    exact = tuple(_copied(argument) for argument in arguments)
    found, expected = _tensors(op.triton.run(*arguments)), _tensors(op.plain(*exact))
    found += [argument for argument in arguments if isinstance(argument, Tensor)]
    expected += [argument for argument in exact if isinstance(argument, Tensor)]
    facts = {"rows": setting.rows, "context": setting.context, "group_size": setting.group_size}
    pairs = [*_restored(zip(found, expected, strict=True)), *_dequantized(arguments, exact)]
    error = max(_error(*pair) - slack for *pair, slack in pairs)
    yield _case(plan, op.name, setting.dtype, error, layer=str(setting.layer), **facts)


def _copied(argument: Any) -> Any:
    """Return a copy for the definition, with 16-bit values in float64."""
    if isinstance(argument, QuantizedSlots):
        return copy.deepcopy(argument)
    if not isinstance(argument, Tensor):
        return argument
    return argument.double() if argument.is_floating_point() else argument.clone()


def _tensors(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _restored(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The pairs, with int8 values and the scales that follow them multiplied, and by how much they may differ more."""
    remaining = iter(pairs)
    for actual, wanted in remaining:
        if actual.dtype != torch.int8:
            yield actual.double(), wanted.double(), 0.0
            continue
        scales, wanted_scales = next(remaining)
        yield _product(actual, scales), _product(wanted, wanted_scales), QUANTIZATION_STEP


def _dequantized(found: tuple[Any, ...], expected: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The pairs of quantized keys and values, and by how much they may differ more."""
    for actual, wanted in zip(found, expected, strict=True):
        if isinstance(actual, QuantizedSlots):
            yield actual.dequantized(torch.float64), wanted.dequantized(torch.float64), actual.largest_step


def _product(values: Tensor, scales: Tensor) -> Tensor:
    return (values.double().view(*scales.shape, -1) * scales.double().unsqueeze(2)).view(values.shape)


def _quantization(job: Job) -> Iterator[Json]:
    """Compare bit for bit, because the integers of a token must not depend on the backend."""
    plan, dtype = job.plan, job.dtype
    for count, width in ((1, 64), (5, 96)) if plan.tiny else ((1, 576), (6, 4096), (17, 12288), (64, 1000)):
        x = _normal(plan, count, width, dtype=dtype)
        for group_size in (None, 8):
            pairs = zip(quantize_tokens(x, group_size), reference.quantize_tokens(x, group_size), strict=True)
            same = all(torch.equal(*pair) for pair in pairs)
            facts = {"rows": count, "width": width, "group_size": group_size}
            yield _case(plan, "quantize_tokens", dtype, 0.0 if same else 1.0, **facts)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value of a row. It is infinite if a value is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    return float(((actual.double() - expected.double()).abs() / scale).max())


def _case(plan: Plan, op: str, dtype: torch.dtype, error: float, **facts: Any) -> Json:
    # Norms and rotations round two or three times.
    tolerance = TOLERANCE[dtype] * (1 if op.startswith("linear") else 3)
    if plan.device.type == "cpu":
        tolerance = max(tolerance, INTERPRETER_TOLERANCE)
    error = error if error == error and error != float("inf") else 1e30
    return {"op": op, "dtype": str(dtype), **facts, "error": error, "correct": error <= tolerance}


def _normal(plan: Plan, *size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, device=plan.device).to(dtype)
