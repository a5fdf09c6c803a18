"""Search the tilings of the largest model's products; compiled by many processes first, timed by this one alone."""

from __future__ import annotations

import dataclasses
import time

import torch
from quasar_kernels import reference
from quasar_kernels.triton import linear_bf16, linear_w4, linear_w8a8, tuning
from quasar_kernels.triton.tuning import Shape, Tiling
from torch import Tensor

from scripts.gpu_suite.contenders import random_int4
from scripts.gpu_suite.plan import Plan
from scripts.gpu_suite.record import Json
from scripts.gpu_suite.timing import milliseconds_per_call
from scripts.gpu_suite.workers import MOST_PROCESSES, in_processes

OPS = ("linear_w8a8", "linear_w4a16", "linear_bf16", "linear_w4a8", "linear_w8a16")
ROWS = (6, 32)
"""One number of rows per size of tile that the suite measures."""
ROTATED_BYTES = 160 << 20
REPEATS = 5
SHARE_TO_COMPILE = 0.6
"""Of the section's time. What is not compiled by then is compiled when it is timed."""


def measure(plan: Plan, seconds: float) -> list[Json]:
    """The chosen tiling of every shape beside the default; shapes for which there was no time keep the default."""
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
    """The most important first: the shapes and ops of the bars."""
    model = plan.passes_model[0]
    products = [product for product in plan.products if product.model == model]
    ops = OPS[:2] if plan.tiny else OPS
    return [
        Shape(op, rows, product.outputs, product.inputs, product.group_size if "w4" in op else 0)
        for rows in (ROWS[:1] if plan.tiny else ROWS)
        for op in ops
        for product in products
        if not (product.layer == "lm_head" and "w4" in op) and (product.layer == "lm_head" or op != "linear_w8a16")
    ]


def _milliseconds(shape: Shape, tiling: Tiling, plan: Plan) -> float:
    nbytes = (
        shape.outputs * shape.inputs * {"linear_bf16": 2.0, "linear_w8a8": 1.0, "linear_w8a16": 1.0}.get(shape.op, 0.5)
    )
    copies = 1 if plan.tiny else max(2, int(-(-ROTATED_BYTES // nbytes)))
    calls = [_Call(shape, tiling, plan.device) for _ in range(copies)]
    return milliseconds_per_call(calls, plan.device, REPEATS)


class _Call:
    """A product with weights of its own."""

    def __init__(self, shape: Shape, tiling: Tiling, device: torch.device) -> None:
        self.shape, self.tiling = shape, tiling
        n, k = shape.outputs, shape.inputs
        self.x = torch.randn(shape.rows, k, device=device).bfloat16()
        self.tokens = reference.quantize_tokens(self.x, shape.group_size or None)
        if shape.group_size:
            self.int4 = random_int4(n, k, shape.group_size, device)
        elif shape.op in ("linear_w8a8", "linear_w8a16"):
            self.values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            self.scales = torch.full((n,), 0.01, device=device)
        else:
            self.values = torch.randn(n, k, device=device, dtype=torch.bfloat16)

    def __call__(self) -> Tensor:
        if self.shape.op == "linear_w4a16":
            return linear_w4.linear_w4a16(self.x, self.int4, None, self.tiling)
        if self.shape.op == "linear_w4a8":
            return linear_w4.linear_w4a8(*self.tokens, self.int4, None, torch.bfloat16, self.tiling)
        if self.shape.op == "linear_w8a8":
            tokens, scales = self.tokens
            return linear_w8a8.linear_w8a8(tokens, scales, self.values, self.scales, None, torch.bfloat16, self.tiling)
        if self.shape.op == "linear_w8a16":
            return linear_bf16.linear_w8a16(self.x, self.values, self.scales, None, self.tiling)
        return linear_bf16.linear_bf16(self.x, self.values, None, self.tiling)


def _compile(shapes: list[Shape], device: torch.device, seconds: float) -> None:
    """Fill Triton's cache on disk: a kernel takes a second to compile, and there are hundreds."""
    jobs = [(shape, tiling) for shape in shapes for tiling in tuning.candidates(shape, tuning.multiprocessors(device))]
    shares = [(jobs[first::MOST_PROCESSES], device) for first in range(MOST_PROCESSES)]
    for _ in in_processes(_compile_share, shares, lambda share, error: None, device, seconds=seconds):
        pass


def _compile_share(share: tuple[list[tuple[Shape, Tiling]], torch.device]) -> None:
    jobs, device = share
    for shape, tiling in jobs:
        # A kernel is compiled for its sizes' divisibility by 16, not for the sizes.
        small = dataclasses.replace(shape, outputs=min(shape.outputs, 4096))
        try:
            _Call(small, tiling, device)()
        except Exception:  # the process that times it will say what is wrong
            continue
