"""Searches the tilings of the largest model's matmuls. Many processes compile them, and this one alone times them."""

from __future__ import annotations

import dataclasses
import time

import torch
from quasar_kernels.matmul import Matmul
from quasar_kernels.ops import MATMULS
from quasar_kernels.triton import tuning
from quasar_kernels.triton.tuning import Shape, Tiling
from torch import Tensor

from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json
from scripts.gpu_suite.timing import milliseconds_per_call
from scripts.gpu_suite.workers import MOST_PROCESSES, in_processes

ROWS = (6, 32)
"""One number of rows for every tile size that the suite measures."""
ROTATED_BYTES = 160 << 20
REPEATS = 5
SHARE_TO_COMPILE = 0.6
"""Share of the section's time for compilation. Later, kernels are compiled when they are timed."""


def measure(plan: Plan, seconds: float) -> list[Json]:
    """Return the chosen tiling of every shape and the default. Shapes for which there was no time keep the default."""
    deadline = time.perf_counter() + seconds
    shapes = _shapes(plan)
    if plan.device.type == "cuda":
        _compile(shapes, plan.device, SHARE_TO_COMPILE * seconds)
    rows: list[Json] = []
    for shape in shapes:
        if time.perf_counter() > deadline:
            rows.append({"shape": shape.key, "error": "no time left"})
            continue
        timed: dict[Tiling, float] = {}

        def milliseconds(tiling: Tiling, shape: Shape = shape, timed: dict[Tiling, float] = timed) -> float:
            timed[tiling] = _milliseconds(shape, tiling, plan)
            return timed[tiling]

        try:
            best = tuning.tune(shape, plan.device, milliseconds)
        except Exception as error:
            rows.append({"shape": shape.key, "error": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        default = tuning.default_tiling(shape, tuning.multiprocessors(plan.device))
        rows.append(
            {
                "shape": shape.key,
                "chosen": dataclasses.asdict(best),
                "default": dataclasses.asdict(default),
                "gain": timed[default] / timed[best] if default in timed else None,
                "microseconds": {str(dataclasses.astuple(tiling)): ms * 1e3 for tiling, ms in timed.items()},
            }
        )
    return rows


def _shapes(plan: Plan) -> list[Shape]:
    """Return the shapes to tune, the most important first: the shapes and ops of the targets."""
    model = plan.passes_model[0]
    products = [product for product in plan.products if product.model == model]
    return [
        Shape(op.name, rows, product.outputs, product.inputs, product.group_size if op.weight_bits == 4 else 0)
        for rows in (ROWS[:1] if plan.tiny else ROWS)
        for op in (MATMULS[:2] if plan.tiny else MATMULS)
        for product in products
        if _is_used(op, product.layer == "lm_head")
    ]


def _is_used(op: Matmul, in_head: bool) -> bool:
    """Return whether a model has such a layer. Heads are never in 4 bit, and W8A16 is used only for heads."""
    if in_head:
        return op.weight_bits > 4
    return op.weight_bits != 8 or op.activations != "float"


def _milliseconds(shape: Shape, tiling: Tiling, plan: Plan) -> float:
    nbytes = shape.outputs * shape.inputs * _op(shape).weight_bits // 8
    copies = 1 if plan.tiny else max(2, -(-ROTATED_BYTES // nbytes))
    calls = [_Call(shape, tiling, plan.device) for _ in range(copies)]
    return milliseconds_per_call(calls, plan.device, REPEATS)


def _op(shape: Shape) -> Matmul:
    return next(op for op in MATMULS if op.name == shape.op)


class _Call:
    """Return a matmul with its own weight."""

    def __init__(self, shape: Shape, tiling: Tiling, device: torch.device) -> None:
        op = _op(shape)
        assert op.triton is not None
        values = torch.randn(shape.outputs, shape.inputs, device=device, dtype=torch.bfloat16)
        x = torch.randn(shape.rows, shape.inputs, device=device).bfloat16()
        self._run, self._tiling = op.triton.run, tiling
        self._x, self._weight = op.quantized(x, shape.group_size), op.round(values, shape.group_size)

    def __call__(self) -> Tensor:
        out: Tensor = self._run(self._x, self._weight, None, self._tiling)
        return out


def _compile(shapes: list[Shape], device: torch.device, seconds: float) -> None:
    """Fill Triton's cache on disk, because a kernel takes a second to compile and there are hundreds."""
    jobs = [(shape, tiling) for shape in shapes for tiling in tuning.candidates(shape, tuning.multiprocessors(device))]
    shares = [(jobs[first::MOST_PROCESSES], device) for first in range(MOST_PROCESSES)]
    for _ in in_processes(_compile_share, shares, lambda share, error: None, device, seconds=seconds):
        pass


def _compile_share(share: tuple[list[tuple[Shape, Tiling]], torch.device]) -> None:
    jobs, device = share
    for shape, tiling in jobs:
        # A compiled kernel depends on whether its sizes are divisible by 16, not on the sizes themselves.
        small = dataclasses.replace(shape, outputs=min(shape.outputs, 4096))
        try:
            _Call(small, tiling, device)()
        except Exception:  # the process that times it will say what is wrong
            continue
